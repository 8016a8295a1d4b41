"""Everything that makes text: the decode engine, its scheduler, sampling, and `transformers`' generate for the rest."""
