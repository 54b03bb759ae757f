"""Loading: leases, flights, stale values, and that nothing out of date is ever stored."""
