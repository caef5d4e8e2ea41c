"""Gathering facts: reading, asking, connecting; never writing. What cannot be read is a fact too."""
