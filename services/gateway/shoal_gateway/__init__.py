"""The gateway: a node's HTTP face. Commands and status, the OpenAI API, and the status page."""
