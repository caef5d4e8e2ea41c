"""Follow changes that others make to the store's files."""
