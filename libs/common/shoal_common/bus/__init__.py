"""NATS: the connection, streams, buckets and keys, and what is built on them."""
