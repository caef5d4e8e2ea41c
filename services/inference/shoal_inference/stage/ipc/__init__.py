"""Messages between the service and its stage processes."""
