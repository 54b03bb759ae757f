"""Loading: leases, single flight, stale values, and the guarantee that no outdated value is stored."""
