"""The store on disk: volumes, partial blobs, commits, tombstones, views."""
