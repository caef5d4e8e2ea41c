"""Read-only directories of models that a node offers as they are."""
