"""Real servers and processes for tests; no mocks."""
