"""Tests of the Redis store with real servers."""
