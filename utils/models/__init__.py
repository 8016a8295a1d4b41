"""Models: tokenizers, loading, the causal and scalar-head wrappers, LoRA, and saving."""
