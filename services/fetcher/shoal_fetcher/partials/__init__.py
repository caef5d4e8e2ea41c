"""A partial blob on the disk: leaves, bitmap, leaf hashes."""
