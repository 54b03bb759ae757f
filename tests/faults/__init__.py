"""What goes wrong between a cache and its Redis, done for real: one list, for the tests and for `docs/reliability.md`."""
