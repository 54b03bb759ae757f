"""Building blocks that several adapters share."""
