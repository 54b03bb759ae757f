"""The Memcached store on real servers."""
