"""What the one leader does: commands, failures, migration, garbage collection."""
