"""Tests of the facade: settings, URLs, the cache and the command line."""
