"""placement: lays models out over the nodes' memory."""
