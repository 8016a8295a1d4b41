"""The decode step of a small model on a CPU: all layers in one compiled call.

Multiplying by a small matrix takes less time than the call from Python.
"""

import math

import torch

from utils.generation.packed_matrix import linear
from utils.generation.weights import Layer
from utils.kernels import decoding


def addresses_of(layers: list[Layer]) -> torch.Tensor | None:
    """What `step` reads: (layers, 6) addresses of norms and matrices; None where any layer is not small enough."""
    addresses = [layer.addresses() for layer in layers]
    return None if None in addresses else torch.tensor(addresses)


def step(decoder, addresses: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """As `eager.step`; `hidden` is overwritten."""
    normed = decoding.small_step(
        addresses, decoder.final_norm, hidden, decoder.cos, decoder.sin, positions, *decoder.cache,
        query_heads=decoder.query_heads, mlp_size=decoder.mlp_size, eps=decoder.norm_eps,
        scale=1 / math.sqrt(decoder.head_size),
    )  # fmt: skip
    return linear(normed, decoder.head, decoder.head_bias, is_step=True)
