"""Redis Cluster: topology and routing."""
