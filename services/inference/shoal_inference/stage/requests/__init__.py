"""Requests in flight: rank 0, followers, the KV budget."""
