"""Who a node is to others: its keys, its certificate, and the secrets that it shares with each other node."""
