"""Sweeps: one run of a step for each combination of flags in a YAML file, and one table and picture of all of them."""
