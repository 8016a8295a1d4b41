"""Shared parts of the three training steps: configuration, data, models, algorithms and the PPO engine."""
