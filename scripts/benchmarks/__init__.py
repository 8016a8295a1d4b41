"""Measurements beside peers, and comparisons of two checkouts. Run one as `python -m scripts.benchmarks.NAME`."""
