"""Log-probabilities of given tokens from hidden states, without a (tokens x vocabulary) tensor in fp32.

With N positions, H hidden units and V words, `head` maps (n, H) to (n, V). Only one chunk of logits exists at a time:
forward and backward recompute a chunk instead of keeping it.
"""

import math
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24  # fp32 logits alive at once: 64 MiB


def chunk_count(num_tokens: int, vocabulary_size: int) -> int:
    """How many chunks `token_logprobs` needs to keep its logits under `LOGITS_PER_CHUNK`."""
    return max(1, math.ceil(num_tokens * vocabulary_size / LOGITS_PER_CHUNK))


def token_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunks: int = 1,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(head(hidden) / temperature) at `targets`, and the entropy of that distribution on request.

    Args:
        hidden: (N, H), the hidden state that predicts each target.
        targets: (N,) token ids.
        chunks: pieces to split N into; `chunk_count` gives a number, and ZeRO-3 ranks must agree on it.

    Returns:
        (N,) fp32 log-probabilities, and (N,) fp32 entropies in nats or None.
    """

    def compute(piece: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = head(piece).float() / temperature
        normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - normalizer
        entropy = normalizer - (torch.softmax(logits, -1) * logits).sum(-1) if with_entropy else None
        return logprobs, entropy

    recompute = chunks > 1 and torch.is_grad_enabled()
    pieces = [
        checkpoint(compute, piece, ids, use_reentrant=False) if recompute else compute(piece, ids)
        for piece, ids in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    ]
    logprobs = torch.cat([piece[0] for piece in pieces])
    return logprobs, torch.cat([piece[1] for piece in pieces]) if with_entropy else None
