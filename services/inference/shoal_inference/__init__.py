"""inference: runs this node's stages and generates. Only stage processes load MLX."""
