"""Tests of the Memcached store with real servers."""
