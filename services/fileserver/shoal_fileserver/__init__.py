"""fileserver: serves ranges of the blobs a node holds."""
