"""Prefill and decode step with PyTorch's operations: for GPUs, and for CPUs without the compiled operations."""

import math

import torch
import torch.nn.functional as F

from utils.generation.packed_matrix import linear
from utils.generation.weights import Layer, Projection
from utils.models.packed_attention import causal_attention


def prefill(decoder, hidden: torch.Tensor, rows: int, first_slot: int, last: torch.Tensor) -> torch.Tensor:
    """Logits after the prompts of `rows` rows, whose keys and values go to the slots from `first_slot` on.

    Args:
        hidden: (rows * T, H) embedded prompts, padded on the right. last: (rows,) places of their last tokens in it.
    """
    width = len(hidden) // rows
    cos, sin = (table[:width].repeat(rows, 1)[:, None] for table in (decoder.cos, decoder.sin))
    keys, values = decoder.cache
    for index, layer in enumerate(decoder.layers):
        query, key, value = _project(decoder, layer, hidden, cos, sin)
        query, key, value = (x.view(rows, width, -1, decoder.head_size).transpose(1, 2) for x in (query, key, value))
        keys[index, first_slot : first_slot + rows, :, :, :width] = key.transpose(2, 3)
        values[index, first_slot : first_slot + rows, :, :width] = value
        attended = causal_attention(query, key, value)
        hidden = _finish(decoder, layer, hidden, attended.transpose(1, 2).reshape(rows * width, -1))
    return _logits(decoder, hidden[last])


def step(decoder, hidden: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """Logits of the token after the newest one of each of the first n slots.

    Args:
        hidden: (n, H) embedded newest tokens. positions: (n,) their places in the sequences.
        length: how much of the cache to read.
    """
    rows, device = len(hidden), hidden.device
    keys, values = decoder.cache
    cos, sin = decoder.cos[positions][:, None], decoder.sin[positions][:, None]
    future = torch.arange(length, device=device) > positions[:, None]
    bias = torch.zeros(rows, length, dtype=decoder.dtype, device=device).masked_fill_(future, float("-inf"))
    group = decoder.query_heads // decoder.kv_heads
    bias = bias[:, None, None].expand(rows, decoder.kv_heads, group, length).reshape(-1, group, length)
    scale = 1 / math.sqrt(decoder.head_size)
    row, head = torch.arange(rows, device=device)[:, None], torch.arange(decoder.kv_heads, device=device)
    place = positions[:, None]
    for index, layer in enumerate(decoder.layers):
        query, key, value = _project(decoder, layer, hidden, cos, sin)
        keys[index].transpose(2, 3).index_put_((row, head, place), key)
        values[index].index_put_((row, head, place), value)
        cached_keys = keys[index, :rows].flatten(0, 1)[:, :, :length]
        cached_values = values[index, :rows].flatten(0, 1)[:, :length]
        query = query.reshape(-1, group, decoder.head_size)
        weights = torch.baddbmm(bias, query, cached_keys, alpha=scale).softmax(-1)
        hidden = _finish(decoder, layer, hidden, torch.bmm(weights, cached_values).view(rows, -1))
    return _logits(decoder, hidden)


def _project(decoder, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Rotated queries (n, Q, D), rotated keys (n, K, D) and values (n, K, D) of n tokens."""
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, decoder.norm_eps)
    joined = layer.qkv.joined_outputs(normed).view(len(hidden), -1, decoder.head_size)
    rotating = joined[:, : decoder.query_heads + decoder.kv_heads]
    rotated = torch.addcmul(rotating * cos, rotating.roll(decoder.head_size // 2, -1), sin)
    query, key = rotated.split((decoder.query_heads, decoder.kv_heads), 1)
    return query, key, joined[:, decoder.query_heads + decoder.kv_heads :]


def _finish(decoder, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Output projection, MLP and both residual connections."""
    hidden = _add_residual(decoder, hidden, layer.output, attended)
    normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, decoder.norm_eps)
    projected = layer.gate_up.outputs(normed)
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
    return _add_residual(decoder, hidden, layer.down, F.silu(gate).mul_(up))


def _add_residual(decoder, residual: torch.Tensor, projection: Projection, inputs: torch.Tensor) -> torch.Tensor:
    """residual + the projection; processes that share the model compute partial sums of it."""
    if decoder.shard is None:
        return projection.added_to(residual, inputs)
    return residual + decoder.summed_output(projection, inputs)


def _logits(decoder, hidden: torch.Tensor) -> torch.Tensor:
    normed = F.rms_norm(hidden, hidden.shape[-1:], decoder.final_norm, decoder.norm_eps)
    return linear(normed, decoder.head, decoder.head_bias)
