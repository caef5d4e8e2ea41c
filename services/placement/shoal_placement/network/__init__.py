"""Links between nodes: measured and modelled."""
