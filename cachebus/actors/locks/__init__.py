"""The lock manager and its clients for lock stores."""
