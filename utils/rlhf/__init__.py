"""The PPO engine: four models, generation, rollouts and updates."""
