"""The Memcached backend."""
