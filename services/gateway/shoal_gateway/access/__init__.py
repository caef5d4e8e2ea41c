"""Who may call the gateway: the node's key, a login in a browser, or this user's own programs on this machine."""
