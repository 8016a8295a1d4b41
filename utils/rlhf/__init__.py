"""PPO: roles and how they share models, scoring, advantages, updates, metrics."""
