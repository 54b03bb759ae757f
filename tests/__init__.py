"""The tests of cachebus."""
