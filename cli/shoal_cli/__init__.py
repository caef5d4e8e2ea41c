"""The `shoal` command: `node` runs this machine's services, `client` talks to a gateway's REST API."""
