"""Frames and connections between stages."""
