"""The node's log files: written in one format, rotated, read back."""
