"""Clients through which a facade calls backends and the lock manager."""
