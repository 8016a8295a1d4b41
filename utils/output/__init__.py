"""What a run shows and writes: metrics, curves, tables, progress."""
