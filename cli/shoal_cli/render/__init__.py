"""What a person sees: tables, progress, units, and the line they type."""
