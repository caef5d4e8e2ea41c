"""fetcher: brings models in, from peers or the hub."""
