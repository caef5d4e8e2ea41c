"""The REST routes: commands and state."""
