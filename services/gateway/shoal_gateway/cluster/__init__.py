"""The cluster as people and clients see it."""
