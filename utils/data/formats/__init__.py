"""The formats that a row can have, and the `Example` that it is converted to."""
