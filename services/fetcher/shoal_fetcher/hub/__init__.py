"""Hugging Face: listings, headers, byte ranges, and how often it is asked."""
