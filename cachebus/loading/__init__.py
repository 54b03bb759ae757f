"""Loading of missing values: one load for all callers."""
