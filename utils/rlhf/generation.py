"""Sampling responses: one small interface, here through `transformers`' own `generate`."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig

from utils.algorithms.masking import response_mask


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. `greedy` ignores temperature, top_k and top_p; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Responses to B prompts. R is the longest response of this batch, in tokens."""

    tokens: torch.Tensor  # (B, R) ids, right-padded
    mask: torch.Tensor  # (B, R) bool, true through the first EOS inclusive
    ended: torch.Tensor  # (B,) bool: the response ended with EOS rather than at the length limit


@torch.no_grad()
def generate(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int,
) -> Generation:  # fmt: skip
    """Sample one response for each of B prompts.

    Args:
        model: a `transformers` causal LM whose weights are whole on this rank.
        input_ids, attention_mask: (B, P), left-padded.
        seed: alone decides the randomness; the global random state is left as it was.
    """
    settings = GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        use_cache=True,
        **(
            {}
            if sampling.greedy
            else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        ),
    )
    devices = [input_ids.device] if input_ids.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=input_ids.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        sequences = model.generate(
            input_ids=input_ids, attention_mask=attention_mask.long(), generation_config=settings, synced_gpus=False
        )
    tokens = sequences[:, input_ids.size(1) :]
    mask = response_mask(tokens, eos_id)
    width = int(mask.sum(1).max())
    tokens, mask = tokens[:, :width], mask[:, :width]
    last = tokens.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    return Generation(tokens=tokens.masked_fill(~mask, pad_id), mask=mask, ended=last == eos_id)
