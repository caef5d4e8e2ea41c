"""The formats of single files in a store: written atomically, read back with checks."""
