"""Tests of workers, and of the commands that speak to them: real processes, a real NATS, a real Redis."""
