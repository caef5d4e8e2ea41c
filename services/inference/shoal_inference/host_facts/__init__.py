"""What this machine has for inference: device, memory, bandwidth."""
