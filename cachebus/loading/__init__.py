"""Loading of missing values: concurrent callers share one load."""
