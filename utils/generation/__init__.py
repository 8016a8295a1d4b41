"""Text generation: the decode engine, its scheduler, sampling, and `transformers`' generate for other models."""
