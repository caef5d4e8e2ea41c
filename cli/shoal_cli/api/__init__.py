"""The gateway's REST API from the command's side: the client, its schema, and the waits built on it."""
