"""Real faults between a cache and its Redis: one list, for the tests and for `docs/reliability.md`."""
