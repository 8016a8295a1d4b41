"""Causal attention within each sequence of a packed row by a compiled operation; `usable` says if it can run."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.calls import call


class PackedAttention(torch.autograd.Function):
    """Attention (N, Q, D) of queries (N, Q, D) to keys and values (N, K, D); saves only these three for backward.

    Args:
        boundaries: (sequences + 1,) int32 on the CPU, where sequences start and end. Tokens behind the last one attend
            to nothing and get zeros.
        scale: of the scores.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        ctx.save_for_backward(query, key, value)
        ctx.boundaries, ctx.scale = boundaries, scale
        ctx.sizes = len(boundaries) - 1, query.size(1), key.size(1), query.size(2)
        attended = torch.zeros_like(query)
        call("attend_packed", query, query, key, value, boundaries, attended, *ctx.sizes, scale)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        inputs = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
        call(
            "attend_packed_backward", gradient, gradient.contiguous(), *inputs, ctx.boundaries, *gradients,
            *ctx.sizes, ctx.scale,
        )  # fmt: skip
        return *gradients, None, None
