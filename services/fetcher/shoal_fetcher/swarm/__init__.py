"""Nodes that fetch the same blob take its leaves from each other (docs/transfer.md)."""
