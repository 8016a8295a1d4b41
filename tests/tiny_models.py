"""Tiny random models of every supported architecture, saved as folders with a tokenizer."""

from pathlib import Path

import torch
import transformers

SIZES = {
    "llama": lambda vocab: transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
    "tied_llama": lambda vocab: transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
    ),
    "opt": lambda vocab: transformers.OPTConfig(
        vocab_size=vocab, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=16, max_position_embeddings=256,
    ),
    "gpt2": lambda vocab: transformers.GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": lambda vocab: transformers.GPTNeoXConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "phi": lambda vocab: transformers.PhiConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256,
    ),
}  # fmt: skip


def save_causal_lm(folder: Path, tokenizer, architecture: str = "llama", *, seed: int = 0, **changes) -> Path:
    """A random causal LM with an embedding for every token of `tokenizer`, and the tokenizer beside it."""
    config = SIZES[architecture](len(tokenizer))
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from uniform, so that mistakes show
        parameter.data.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, tokenizer, architecture: str = "llama", *, seed: int = 1, **changes) -> Path:
    """A random scalar-head model as step 2 writes it, with a score scale."""
    config = SIZES[architecture](len(tokenizer))
    for name, value in {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **changes}.items():
        setattr(config, name, value)
    config.score_mean, config.score_std = 0.25, 0.5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
