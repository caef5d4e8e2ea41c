"""storage: owns a node's disk."""
