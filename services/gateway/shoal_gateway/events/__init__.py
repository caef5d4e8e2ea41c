"""The event log as server-sent events."""
