"""Building blocks shared by several adapters."""
