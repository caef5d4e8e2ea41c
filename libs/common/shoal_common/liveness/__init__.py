"""Who is up, who is not, and whether the versions fit together."""
