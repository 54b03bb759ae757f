"""Tests of the adapters: one technology each."""
