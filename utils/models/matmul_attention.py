"""Causal attention of a CPU in bf16, as matrix products over blocks of queries, with compiled operations between them.

    S   sequences, padded to T on the right        n   S * heads        D   size of a head

The softmax weights of a block exist while it is computed, in the forward and again in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from utils.kernels import attention as kernels
from utils.kernels.native import usable

MATMUL_WIDTH = 1024  # longest sequences for which a CPU computes attention in bf16 as plain matrix products
QUERY_BLOCK = 128  # queries of one such product, which leaves out the keys behind the block


@dataclass(frozen=True)
class Group:
    """Sequences of similar lengths, side by side in the row. `places` are their tokens' in an (S, T) rectangle."""

    tokens: int
    sequences: int
    width: int
    places: torch.Tensor | None  # (tokens,) int64; None where the tokens fill the rectangle in order


def uses_matmul(width: int, dtype: torch.dtype, device_type: str, dropout: float) -> bool:
    """Whether sequences of `width` tokens go through `matmul_attention` rather than a fused kernel."""
    return width <= MATMUL_WIDTH and device_type == "cpu" and dtype == torch.bfloat16 and not dropout


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention as matrix products; the fused kernel takes two to three times as long in bf16 on a CPU."""
    sequences, heads = query.shape[:2]
    query, key, value = (_batch(tensor, heads) for tensor in (query, key, value))
    return _attended(query, key, value, scaling or query.size(-1) ** -0.5).unflatten(0, (sequences, heads))


def _batch(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(S, heads or fewer, T, D) as contiguous (S * heads, T, D), heads repeated."""
    if tensor.size(1) != heads:
        tensor = tensor.repeat_interleave(heads // tensor.size(1), 1)
    return tensor.reshape(-1, *tensor.shape[2:])


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention (n, T, D) of queries to keys and values, all (n, T, D)."""
    attended = torch.empty_like(query)
    for block, weights in _weights(query, key, scaling):
        attended[:, block] = torch.bmm(weights, value[:, : block.stop])
    return attended


def _weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of queries, the last one first, and their softmax weights (n, block, end of the block)."""
    compiled = usable(query) and not torch.is_grad_enabled()  # autograd would not see that it works in place
    width = query.size(1)
    future = torch.full((1, 1) if compiled else (width, width), float("-inf"), dtype=query.dtype, device=query.device)
    future.triu_(1)
    for start in reversed(range(0, width, QUERY_BLOCK)):
        block = slice(start, min(start + QUERY_BLOCK, width))
        mask = future if compiled else future[block, : block.stop]
        scores = torch.baddbmm(mask, query[:, block], key[:, : block.stop].transpose(1, 2), alpha=scaling)
        if compiled:
            kernels.causal_softmax_(scores, start)
        yield block, scores if compiled else scores.softmax(-1)


def _gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from that of `_attended`, all (n, T, D).

    The softmax weights are computed again, a block at a time (Dao et al. 2022, appendix B.2).
    """
    of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    for block, weights in _weights(query, key, scaling):
        seen = slice(block.stop)
        of_scores = torch.bmm(gradient[:, block], value[:, seen].transpose(1, 2))  # of the weights, so far
        if usable(of_scores):
            kernels.causal_softmax_backward_(of_scores, weights, block.start)
        else:
            of_scores = torch.ops.aten._softmax_backward_data(of_scores, weights, -1, weights.dtype)
        of_query[:, block] = torch.bmm(of_scores, key[:, seen])
        for total, of_block, other in ((of_key, of_scores, query), (of_value, weights, gradient)):
            summand = torch.bmm(of_block.transpose(1, 2), other[:, block])
            if block.stop == query.size(1):  # the first one, which sees all keys
                total.copy_(summand)
            else:
                total[:, seen] += summand
    return of_query.mul_(scaling), of_key.mul_(scaling), of_value


class PackedMatmulAttention(torch.autograd.Function):
    """`matmul_attention` of each group of a packed row; keeps nothing but (N, heads, D) queries, keys and values."""

    @staticmethod
    def forward(ctx, query, key, value, groups: list[Group], scaling: float | None) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scaling, ctx.heads = groups, scaling or query.size(-1) ** -0.5, query.size(1)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        start = 0
        for group in groups:
            rows = slice(start, start := start + group.tokens)
            rectangles = (_gathered(tensor[rows], group, ctx.heads) for tensor in (query, key, value))
            _put_back(_attended(*rectangles, ctx.scaling), group, attended[rows], ctx.heads)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
        start = 0
        for group in ctx.groups:
            rows = slice(start, start := start + group.tokens)
            rectangles = (_gathered(tensor[rows], group, ctx.heads) for tensor in (gradient, *inputs))
            for total, found in zip(gradients, _gradients(*rectangles, ctx.scaling), strict=True):
                _put_back(found, group, total[rows], ctx.heads)
        return *gradients, None, None


def _gathered(tokens: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """(tokens, heads or fewer, D) of a group as (S * heads, T, D), heads repeated."""
    if usable(tokens):
        return kernels.gather_heads(
            tokens, group.places, sequences=group.sequences, width=group.width, query_heads=heads
        )
    if group.places is not None:
        blank = tokens.new_zeros(group.sequences * group.width, *tokens.shape[1:])
        tokens = blank.index_copy_(0, group.places, tokens)
    return _batch(tokens.unflatten(0, (group.sequences, group.width)).transpose(1, 2), heads)


def _put_back(rectangle: torch.Tensor, group: Group, tokens: torch.Tensor, heads: int) -> None:
    """The real tokens of (S * heads, T, D) into `tokens` (tokens, heads or fewer, D), repeated heads added up."""
    if usable(tokens):
        kernels.scatter_heads(rectangle, group.places, tokens, query_heads=heads)
        return
    parts = rectangle.unflatten(0, (group.sequences, tokens.size(1), -1))
    rows = (parts.sum(2) if parts.size(2) > 1 else parts.squeeze(2)).transpose(1, 2)
    if group.places is None:
        tokens.view(rows.shape).copy_(rows)
    else:
        torch.index_select(rows.flatten(0, 1), 0, group.places, out=tokens)
