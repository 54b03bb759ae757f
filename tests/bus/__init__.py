"""Tests of the bus floor."""
