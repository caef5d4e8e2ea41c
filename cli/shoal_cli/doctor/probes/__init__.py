"""Gathering facts: reading, asking, connecting; never writing. An unreadable thing is a fact too."""
