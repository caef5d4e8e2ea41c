"""What storage answers: one module per group of commands and requests."""
