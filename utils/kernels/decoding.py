"""The compiled operations of a decode step. All tensors are contiguous and on the CPU; `usable` says whether they run.

Notation as in `decode.cpp`: n rows, H hidden units, D units of a head, Q query and K key-value heads, V words.
"""

import functools

import torch

from utils.kernels.native import operation

_operation = functools.cache(operation)


def add_rms_norm(
    residual: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, normed: torch.Tensor, eps: float
) -> None:
    """residual (n, H) += added, in place; normed (n, H) = weight (H,) * residual / its root mean square."""
    rows, size = residual.shape
    _operation("add_rms_norm", residual.dtype, "ppppiifi")(
        residual.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), normed.data_ptr(),
        rows, size, eps, torch.get_num_threads(),
    )  # fmt: skip


def attend(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, *, query_heads: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention (n, Q D) of one new token in each row, whose key and value it puts into the cache.

    Args:
        projected: (n, (Q + 2 K) D) queries, keys and values, not rotated yet.
        cos, sin: (positions, D) tables; `sin` is negative where it multiplies the second half of a head.
        positions: (n,) int64 place of each row's token, which sees everything up to it.
        keys, values: (slots, K, D, capacity) and (slots, K, capacity, D), capacity a multiple of 16.
    """
    rows, (_, kv_heads, size, capacity) = len(projected), keys.shape
    attended = projected.new_empty(rows, query_heads * size)
    _operation("attend", projected.dtype, "pppppppiiiiifi")(
        projected.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), keys.data_ptr(), values.data_ptr(),
        attended.data_ptr(), rows, query_heads, kv_heads, size, capacity, scale, torch.get_num_threads(),
    )  # fmt: skip
    return attended


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (n, I) of (n, 2 I) rows that hold both side by side."""
    rows, size = gate_up.size(0), gate_up.size(1) // 2
    outputs = gate_up.new_empty(rows, size)
    _operation("gated", gate_up.dtype, "ppiii")(
        gate_up.data_ptr(), outputs.data_ptr(), rows, size, torch.get_num_threads()
    )
    return outputs


def choose(
    logits: torch.Tensor, keys: torch.Tensor, counters: torch.Tensor, *, greedy: bool, temperature: float,
    min_new_tokens: int, eos_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`utils.rlhf.sampling.choose_tokens` without top-k and top-p: (n,) int64 tokens and their fp32 log-probabilities.

    The logits (n, V) are read, but never copied: the probabilities exist sixteen at a time.
    """
    rows, words = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    _operation("choose", logits.dtype, "pppppiiiiifi")(
        logits.data_ptr(), keys.data_ptr(), counters.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(),
        rows, words, greedy, min_new_tokens, eos_id, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logprobs
