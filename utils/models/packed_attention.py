"""Several sequences end to end in one row: no layer computes padding, and attention stays inside each sequence.

    N   real tokens of a batch, longest sequence first      T   longest sequence of a group
    S   sequences                                           D   size of a head

`transformers` calls `attend` for models whose attention implementation is `PACKED`. It gets the layout of the row as a
keyword of the model's forward; a call without one (generation) is ordinary attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.algorithms.masking import position_ids
from utils.kernels import attention as kernels
from utils.kernels.native import usable

PACKED = "packed"
# Architectures whose layers see other tokens through the attention interface alone, and their place by position ids.
PACKABLE = ("llama", "opt", "gpt2", "gpt_neox", "phi")
GROUP_SPREAD = 2  # sequences whose lengths differ by less than this factor are padded to each other for attention
MATMUL_WIDTH = 1024  # longest sequences for which a CPU computes attention in bf16 as plain matrix products
QUERY_BLOCK = 128  # queries of one such product, which leaves out the keys behind the block


@dataclass(frozen=True)
class Group:
    """Sequences of similar lengths, side by side in the row. `places` are their tokens' in an (S, T) rectangle."""

    tokens: int
    sequences: int
    width: int
    places: torch.Tensor | None  # (tokens,) int64; None where the tokens fill the rectangle in order


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a padded batch lie in the row. All tensors are on the batch's device."""

    index: torch.Tensor  # (N,) places of the row's tokens in the flattened (B, T) batch
    positions: torch.Tensor  # (1, N) place of each token in its sequence
    boundaries: torch.Tensor  # (S + 1,) int32, where sequences start and end
    longest: int
    groups: list[Group]


def pack(attention_mask: torch.Tensor) -> Layout:
    """The layout for a (B, T) batch, padded on either side; rows without a token take no part."""
    rows, columns = attention_mask.shape
    device, mask = attention_mask.device, attention_mask.bool()
    counts = mask.sum(1)
    lengths, order = counts.sort(descending=True, stable=True)
    first = mask.int().argmax(1)
    inside = torch.arange(columns, device=device) < lengths[:, None]
    index = ((order * columns + first[order])[:, None] + torch.arange(columns, device=device))[inside]
    positions = torch.arange(columns, device=device).expand(rows, -1)[inside]
    lengths_list = [length for length in lengths.tolist() if length]
    boundaries = F.pad(lengths[: len(lengths_list)].cumsum(0), (1, 0)).int()
    return Layout(index, positions[None], boundaries, lengths_list[0], _groups(lengths_list, device))


def _groups(lengths: list[int], device: torch.device) -> list[Group]:
    groups, start = [], 0
    while start < len(lengths):
        width = lengths[start]
        end = next((i for i in range(start, len(lengths)) if lengths[i] * GROUP_SPREAD <= width), len(lengths))
        part = lengths[start:end]
        places = None
        if part[-1] != width:
            inside = torch.arange(width) < torch.tensor(part)[:, None]
            places = inside.flatten().nonzero().squeeze(1).to(device)
        groups.append(Group(sum(part), len(part), width, places))
        start = end
    return groups


class _Spread(torch.autograd.Function):
    """Rows of `x` to `places` of a zeroed tensor with `count` rows; `places` are distinct, so backward only reads."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """The rows of `x` at distinct `places`; the backward pass of `_Spread`, and the other way round."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, ctx.saved_tensors[0], gradient), None


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, *,
    scaling: float | None = None, dropout: float = 0.0, layout: Layout | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of (1, heads, N, D) queries, keys and values laid out as `layout` says; (1, N, heads, D)."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    grouped_heads = query.size(1) != key.size(1)
    if _has_flash_varlen(query, dropout):
        attended = varlen_attn(
            query, key, value, layout.boundaries, layout.boundaries, layout.longest, layout.longest,
            scale=scaling, window_size=(-1, 0), enable_gqa=grouped_heads,
        )  # fmt: skip
        return attended[None], None
    if uses_matmul(layout.longest, query.dtype, query.device.type, dropout):
        return PackedMatmulAttention.apply(query, key, value, layout.groups, scaling)[None], None
    sizes = [group.tokens for group in layout.groups]
    attended = []
    for group, *parts in zip(layout.groups, *(t.split(sizes) for t in (query, key, value)), strict=True):
        rectangles = [_rectangle(part, group) for part in parts]
        out = causal_attention(*rectangles, scaling=scaling, dropout=dropout)
        out = out.transpose(1, 2).flatten(0, 1)
        attended.append(out if group.places is None else _Collect.apply(out, group.places))
    return (torch.cat(attended) if len(attended) > 1 else attended[0])[None], None


def _rectangle(tokens: torch.Tensor, group: Group) -> torch.Tensor:
    """(tokens, heads, D) of a group as (S, heads, T, D), padded on the right, where causal attention never looks."""
    if group.places is not None:
        tokens = _Spread.apply(tokens, group.places, group.sequences * group.width)
    return tokens.unflatten(0, (group.sequences, group.width)).transpose(1, 2)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of (S, heads, T, D) queries to keys and values of as many or fewer heads, up to their own place."""
    if uses_matmul(query.size(2), query.dtype, query.device.type, dropout):
        return matmul_attention(query, key, value, scaling)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=query.size(1) != key.size(1)
    )


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
    compiled, width = usable(query), query.size(1)
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
    return _batch(_rectangle(tokens, group), heads)


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


def _has_flash_varlen(query: torch.Tensor, dropout: float) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and query.size(2) <= 256
        and query.size(2) % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def token_states(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, Layout]:
    """Last hidden states of the real tokens of a (B, T) batch, (N, H), in the order of the layout that comes with them.

    Args:
        model: a `transformers` base model (without head). One whose attention implementation is not `PACKED` computes
            the padded batch, and the result is the same.
    """
    layout = pack(attention_mask)
    if model.config._attn_implementation == PACKED:
        ids = input_ids.flatten()[layout.index][None]
        # a mask with four dimensions is handed on as it is: transformers builds none of its own
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        states = model(
            ids, attention_mask=no_mask, position_ids=layout.positions, use_cache=False, layout=layout
        ).last_hidden_state[0]
        return states, layout
    states = model(
        input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1)[layout.index], layout


def enable_packing(model: nn.Module) -> None:
    """Let `model` compute packed rows, where its architecture is known to do it right."""
    if model.config.model_type in PACKABLE:
        model.set_attn_implementation(PACKED)


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)
