"""fetcher: downloads models to this node, from other nodes or the hub."""
