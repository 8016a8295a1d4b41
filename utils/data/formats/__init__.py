"""What a row can look like, and the `Example` that becomes of it."""
