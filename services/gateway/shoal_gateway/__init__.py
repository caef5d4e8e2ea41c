"""gateway: a node's HTTP server. REST commands and status, the OpenAI API, and the status page."""
