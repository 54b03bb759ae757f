"""The Redis backend: standalone, Sentinel and Cluster."""
