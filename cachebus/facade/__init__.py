"""What users call: caches, locks, rate limits and stores of state."""
