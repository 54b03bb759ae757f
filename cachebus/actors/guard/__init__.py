"""Protection of a backend: adaptive timeouts, retries, a circuit breaker and a concurrency limit."""
