"""Protection of a backend: timeouts, retries, circuit breaker and concurrency limit."""
