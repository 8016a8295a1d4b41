"""A run from its first check to its summary."""
