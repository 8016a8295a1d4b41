"""Prefill and decode step with the compiled operations of `utils.kernels`, for fp32 and bf16 on a CPU."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils.generation.packed_matrix import linear
from utils.kernels import decoding
from utils.kernels.shapes import rounded_rows


def prefill(decoder, hidden: torch.Tensor, rows: int, first_slot: int, last: torch.Tensor) -> torch.Tensor:
    """As `eager.prefill`."""

    def attend(index: int, projected: torch.Tensor) -> torch.Tensor:
        """Attention inside the prompts, whose keys and values go to the cache of layer `index`."""
        keys, values = (part[index, first_slot : first_slot + rows] for part in decoder.cache)
        attended = decoding.attend_prompts(
            projected.view(rows, -1, projected.size(1)), decoder.cos, decoder.sin, keys, values,
            query_heads=decoder.query_heads, scale=1 / math.sqrt(decoder.head_size),
        )  # fmt: skip
        return attended.flatten(0, 1)

    return _logits(decoder, hidden, attend, last)


def step(decoder, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """As `eager.step`; each row reads the cache up to its own position."""

    def attend(index: int, projected: torch.Tensor) -> torch.Tensor:
        """Attention of one token in each row to what layer `index` has in the cache."""
        keys, values = (part[index] for part in decoder.cache)
        return decoding.decode_attention(
            projected, decoder.cos, decoder.sin, positions, keys, values, query_heads=decoder.query_heads,
            scale=1 / math.sqrt(decoder.head_size),
        )  # fmt: skip

    return _logits(decoder, hidden, attend)


def _logits(decoder, hidden: torch.Tensor, attend: Callable, last: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of `hidden` (tokens, H).

    Args:
        attend: (index of a layer, its queries, keys and values (tokens, (Q + 2 K) D)) -> attended (tokens, Q D).
        last: places of the tokens of a prefill whose logits are wanted; None for a decode step.
    """
    is_step, count = last is None, len(hidden)
    hidden = _filled_up(hidden)
    attended = hidden.new_zeros(len(hidden), decoder.query_heads * decoder.head_size)
    normed, added = torch.empty_like(hidden), None
    for index, layer in enumerate(decoder.layers):
        decoding.add_rms_norm(hidden, added, layer.input_norm, normed, decoder.norm_eps)
        attended[:count] = attend(index, layer.qkv.joined_outputs(normed, is_step=is_step)[:count])
        added = decoder.summed_output(layer.output, attended, is_step=is_step)
        decoding.add_rms_norm(hidden, added, layer.mlp_norm, normed, decoder.norm_eps)
        gated = decoding.gated(layer.gate_up.joined_outputs(normed, is_step=is_step))
        added = decoder.summed_output(layer.down, gated, is_step=is_step)
    if last is not None:
        count = len(last)
        hidden, added, normed = (_filled_up(tensor[last]) for tensor in (hidden, added, normed))
    decoding.add_rms_norm(hidden, added, decoder.final_norm, normed, decoder.norm_eps)
    return linear(normed, decoder.head, decoder.head_bias, is_step=is_step)[:count]


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """(n, H) padded with rows of zeros to one of a few numbers of rows."""
    return F.pad(rows, (0, 0, 0, rounded_rows(len(rows), rows.device) - len(rows)))
