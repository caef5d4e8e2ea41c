"""The HTTP server of the gateway and the fileserver: one protocol, and what it bounds."""
