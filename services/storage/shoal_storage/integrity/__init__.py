"""Verify blobs, set corrupt ones aside, repair them."""
