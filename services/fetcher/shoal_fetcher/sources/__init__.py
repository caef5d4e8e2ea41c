"""Pure: where a blob comes from, which leaves are needed, what a failure means."""
