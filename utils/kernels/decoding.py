"""The compiled operations of a decode step. All tensors are contiguous and on the CPU; `usable` says if they can run.

Notation as in `decode.cpp`: n rows, H hidden units, D units of a head, Q query and K key-value heads, V vocabulary.
"""

import torch

from utils.kernels.calls import call

LANES = 16  # numbers of a vector, as in `vectors.h`


def add_rms_norm(
    residual: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, normed: torch.Tensor, eps: float
) -> None:
    """residual (n, H) += added, in place; normed (n, H) = weight (H,) * residual / its root mean square."""
    rows, size = residual.shape
    call("add_rms_norm", residual, residual, added, weight, normed, rows, size, eps)


def decode_attention(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, *, query_heads: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention (n, Q D) of one new token in each row, whose key and value it writes to the cache.

    Args:
        projected: (n, (Q + 2 K) D) queries, keys and values, not rotated yet.
        cos, sin: (positions, D) tables; `sin` is negative where it multiplies the second half of a head.
        positions: (n,) int64 position of each row's token, which attends to everything up to itself.
        keys, values: (slots, K, D, capacity) and (slots, K, capacity, D), capacity a multiple of 16.
    """
    rows, (_, kv_heads, size, capacity) = len(projected), keys.shape
    attended = projected.new_empty(rows, query_heads * size)
    call(
        "attend", projected, projected, cos, sin, positions, keys, values, attended, rows, query_heads, kv_heads,
        size, capacity, scale,
    )  # fmt: skip
    return attended


def attend_prompts(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *,
    query_heads: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Causal attention (n, W, Q D) inside whole prompts, whose keys and values it writes to the cache.

    Args:
        projected: (n, W, (Q + 2 K) D), of which the first token has position 0.
        cos, sin, keys, values: as for `decode_attention`, the cache of these n rows.
    """
    (rows, width, _), (_, kv_heads, size, capacity) = projected.shape, keys.shape
    attended = projected.new_empty(rows, width, query_heads * size)
    call(
        "attend_prompts", projected, projected, cos, sin, keys, values, attended, rows, width, query_heads, kv_heads,
        size, capacity, scale,
    )  # fmt: skip
    return attended


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (n, I) of (n, 2 I) rows that hold both side by side."""
    rows, size = gate_up.size(0), gate_up.size(1) // 2
    outputs = gate_up.new_empty(rows, size)
    call("gated", gate_up, gate_up, outputs, rows, size)
    return outputs


def panels(weight: torch.Tensor) -> torch.Tensor:
    """An (out, in) matrix as `small_product` reads it: (ceil(out / 16), in, 16)."""
    outputs, size = weight.shape
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % LANES))
    return filled.view(-1, LANES, size).transpose(1, 2).contiguous()


def small_product(inputs: torch.Tensor, panels: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    """(n, in) -> (n, outputs) by a matrix in `panels`, plus the bias (outputs,)."""
    rows, size = inputs.shape
    result = inputs.new_empty(rows, outputs)
    call("small_product", inputs, inputs, panels, bias, result, rows, size, outputs)
    return result


def small_step(
    layers: torch.Tensor, final_norm: torch.Tensor, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, query_heads: int, mlp_size: int, eps: float,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """All layers of a small model for one new token in each row; (n, H) normed states for the head.

    `hidden` is overwritten.

    Args:
        layers: (layers, 6) int64 addresses of input norm, qkv, output, MLP norm, gate and up, down: matrices in panels.
        keys, values: the whole cache, (layers, slots, K, D, capacity) and (layers, slots, K, capacity, D).
        cos, sin, positions: as for `decode_attention`.
    """
    (rows, hidden_size), (_, slots, kv_heads, size, capacity) = hidden.shape, keys.shape
    normed = torch.empty_like(hidden)
    call(
        "small_step", hidden, layers, final_norm, hidden, normed, cos, sin, positions, keys, values, len(layers),
        rows, hidden_size, mlp_size, query_heads, kv_heads, size, slots, capacity, eps, scale,
    )  # fmt: skip
    return normed


def choose_from_logits(
    logits: torch.Tensor, keys: torch.Tensor, counters: torch.Tensor, temperatures: torch.Tensor,
    minimums: torch.Tensor, *, eos_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`generation.sampling.choose_tokens` without top-k and top-p: (n,) int64 tokens and their fp32 log-probabilities.

    The logits (n, V) are read but never copied: the probabilities are computed sixteen at a time.

    Args:
        temperatures: (n,) float64, 0 for the most likely token.
        minimums: (n,) int64; while a counter is below it, EOS is forbidden.
    """
    rows, words = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    call(
        "choose", logits, logits, keys, counters, temperatures, minimums, tokens, logprobs, rows, words, eos_id,
    )  # fmt: skip
    return tokens, logprobs
