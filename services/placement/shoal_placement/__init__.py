"""placement: decides which nodes run which layers of which model."""
