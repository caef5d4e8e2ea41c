"""Commands that talk to a gateway's REST API."""
