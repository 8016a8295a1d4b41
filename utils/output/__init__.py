"""What a run shows and leaves behind: metrics, curves, tables, progress."""
