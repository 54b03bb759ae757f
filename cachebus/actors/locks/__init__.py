"""The lock manager and its client for lock stores."""
