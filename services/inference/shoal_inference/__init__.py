"""inference: hosts MLX stages and generates. MLX itself is only loaded in the stage processes."""
