"""Real servers and processes for tests. Nothing here pretends to be anything."""
