"""Who belongs to the cluster: the operator's files, what NATS lets each node do, invitations and joining."""
