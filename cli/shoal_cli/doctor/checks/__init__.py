"""The checks. Each module is pure: it has the facts of one concern and returns findings."""
