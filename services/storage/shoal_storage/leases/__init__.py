"""Who uses a model now: leases, their files and locks."""
