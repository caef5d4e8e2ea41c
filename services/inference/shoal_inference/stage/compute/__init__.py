"""MLX: the layers, their forward pass and their caches."""
