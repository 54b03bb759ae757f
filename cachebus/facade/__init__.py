"""The public API: caches, locks, rate limits, and state and secret stores."""
