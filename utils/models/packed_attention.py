"""Several sequences end to end in one row: they are not padded to each other, and attention stays inside each.

    N   real tokens of a batch, longest sequence first      T   longest sequence of a group
    S   sequences                                           D   size of a head

Two answers to one prompt are two sequences with the same beginning. What a model computes for it is the same in both,
so the row can hold it once (`SharedPrompts`): only inside attention it stands in front of each answer.

`transformers` calls `attend_packed` for models whose attention implementation is `PACKED`. It gets the layout of the
row as a keyword of the model's forward; a call without one (generation) is ordinary attention.
"""

import inspect
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.algorithms.masking import left_aligned, position_ids
from utils.kernels.attention import PackedAttention
from utils.kernels.native import usable
from utils.kernels.shapes import rounded_rows

PACKED = "packed"
# Architectures whose layers see other tokens through the attention interface alone, and their place by position ids.
PACKABLE = ("llama", "opt", "gpt2", "gpt_neox", "phi")
# Older versions of PyTorch find out for themselves that several query heads share a key head.
VARLEN_NEEDS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
LEAST_SHARED = 0.05  # share of a batch's tokens that must be left out for sharing prompts to pay
GROUP_SPREAD = 2  # sequences whose lengths differ by less than this factor are padded to each other for attention


@dataclass(frozen=True)
class Group:
    """Sequences of similar lengths, side by side in the row. `places` are their tokens' in an (S, T) rectangle."""

    tokens: int
    sequences: int
    width: int
    places: torch.Tensor | None  # (tokens,) int64; None where the tokens fill the rectangle in order


@dataclass(frozen=True)
class SharedPrompts:
    """Which tokens of the sequences a row leaves out because an earlier sequence of the batch begins with them too.

    Of M tokens in all sequences, N are in the row.
    """

    kept: torch.Tensor  # (N,) numbers, among the M tokens, of those in the row
    source: torch.Tensor  # (M,) for each token its place in the row
    left_out: torch.Tensor  # (M - N,) numbers of those that are left out
    copied: torch.Tensor  # (M - N,) their places in the row, all different


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a padded batch lie in the row. All tensors are on the batch's device.

    M tokens stand in the sequences; the row holds all of them (N = M), or with `shared` fewer.
    """

    index: torch.Tensor  # (M,) places of the tokens in the flattened (B, T) batch
    positions: torch.Tensor  # (1, M) place of each token in its sequence
    boundaries: torch.Tensor  # (S + 1,) int32, where sequences start and end
    longest: int
    groups: list[Group]
    shared: SharedPrompts | None = None

    def in_row(self, tokens: torch.Tensor) -> torch.Tensor:
        """Places in the row of tokens that are given by their numbers among all sequences' tokens."""
        return tokens if self.shared is None else self.shared.source[tokens]

    def of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """(M, ...) what belongs to each token of the sequences, from (N, ...) for those in the row."""
        return values if self.shared is None else values.index_select(0, self.shared.source)


def packed_layout(attention_mask: torch.Tensor, prompt_lengths: torch.Tensor | None = None) -> Layout:
    """The layout for a (B, T) batch, padded on either side; rows without a token take no part.

    Args:
        prompt_lengths: (B/2,) for a batch padded on the right: the first tokens that rows i and B/2 + i have in
            common, and which the row is to hold once.
    """
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
    layout = Layout(index, positions[None], boundaries, lengths_list[0], _groups(lengths_list, device))
    if prompt_lengths is None:
        return layout
    return replace(layout, shared=_shared_prompts(layout, prompt_lengths, columns))


def _shared_prompts(layout: Layout, prompt_lengths: torch.Tensor, columns: int) -> SharedPrompts | None:
    """None where prompts are too short for this to be worth its copies."""
    half = len(prompt_lengths)
    row, column = layout.index // columns, layout.positions[0]
    is_copy = (row >= half) & (column < prompt_lengths[row % half])
    left_out = is_copy.nonzero().squeeze(1)
    if len(left_out) < LEAST_SHARED * len(row):
        return None
    kept = (~is_copy).nonzero().squeeze(1)
    row_of_place = torch.zeros(2 * half * columns, dtype=torch.long, device=row.device)
    row_of_place[layout.index[kept]] = torch.arange(len(kept), device=row.device)
    source = row_of_place[layout.index - is_copy * (half * columns)]
    return SharedPrompts(kept, source, left_out, source[left_out])


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


class _Repeat(torch.autograd.Function):
    """(M, ...) from (N, ...) as `SharedPrompts.source` says; a gradient is the sum of those of a token's copies."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shared: SharedPrompts) -> torch.Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.source)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        shared = ctx.shared
        total = gradient.index_select(0, shared.kept)
        return total.index_add_(0, shared.copied, gradient.index_select(0, shared.left_out)), None


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


def attend_packed(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, *,
    scaling: float | None = None, dropout: float = 0.0, layout: Layout | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of (1, heads, N, D) queries, keys and values laid out as `layout` says; (1, N, heads, D).

    Tokens behind those of the layout get zeros.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    shared = layout.shared
    if shared is None:
        return _attend(query, key, value, layout, scaling, dropout)[None], None
    attended = _attend(
        *(_Repeat.apply(x[: len(shared.kept)], shared) for x in (query, key, value)), layout, scaling, dropout
    )
    attended = _Collect.apply(attended, shared.kept)
    return F.pad(attended, (0, 0, 0, 0, 0, len(query) - len(attended)))[None], None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention (M, heads, D) of every token of the sequences to those before it in its own."""
    if _has_flash_varlen(query, dropout):
        grouped_heads = {"enable_gqa": query.size(1) != key.size(1)} if VARLEN_NEEDS_GQA else {}
        attended = varlen_attn(
            query, key, value, layout.boundaries, layout.boundaries, layout.longest, layout.longest,
            scale=scaling, window_size=(-1, 0), **grouped_heads,
        )  # fmt: skip
        return attended
    if usable(query) and not dropout:
        scale = scaling or query.size(-1) ** -0.5
        return PackedAttention.apply(query, key, value, layout.boundaries, scale)
    sizes, count = [group.tokens for group in layout.groups], len(query)
    parts = [tensor[: sum(sizes)].split(sizes) for tensor in (query, key, value)]
    attended = []
    for group, *rows in zip(layout.groups, *parts, strict=True):
        out = causal_attention(*(_rectangle(part, group) for part in rows), scaling=scaling, dropout=dropout)
        out = out.transpose(1, 2).flatten(0, 1)
        attended.append(out if group.places is None else _Collect.apply(out, group.places))
    if count > sum(sizes):
        attended.append(query.new_zeros(count - sum(sizes), *query.shape[1:]))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _rectangle(tokens: torch.Tensor, group: Group) -> torch.Tensor:
    """(tokens, heads, D) of a group as (S, heads, T, D), padded on the right, where causal attention never looks."""
    if group.places is not None:
        tokens = _Spread.apply(tokens, group.places, group.sequences * group.width)
    return tokens.unflatten(0, (group.sequences, group.width)).transpose(1, 2)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of (S, heads, T, D) queries to keys and values of as many or fewer heads, up to their own place."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=query.size(1) != key.size(1)
    )


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
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Layout]:
    """Last hidden states of the real tokens of a (B, T) batch, (N, H), in the order of the layout that comes with them.

    Args:
        model: a `transformers` base model (without head). One whose attention implementation is not `PACKED` computes
            the padded batch, and the result is the same.
        prompt_lengths: see `packed_layout`; in a padded batch prompts are not shared.
    """
    if model.config._attn_implementation == PACKED:
        layout = packed_layout(attention_mask, prompt_lengths)
        index, positions = layout.index, layout.positions
        if layout.shared is not None:
            index, positions = index[layout.shared.kept], positions[:, layout.shared.kept]
        count = len(index)
        spare = rounded_rows(count, input_ids.device) - count if model.dtype == torch.bfloat16 else 0
        ids = F.pad(input_ids.flatten()[index][None], (0, spare))
        # a mask with four dimensions is handed on as it is: transformers builds none of its own
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        positions = F.pad(positions, (0, spare))
        states = model(
            ids, attention_mask=no_mask, position_ids=positions, use_cache=False, layout=layout
        ).last_hidden_state[0]
        return states[:count], layout
    layout = packed_layout(attention_mask)
    mask, ids = left_aligned(attention_mask.bool(), input_ids)
    states = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).last_hidden_state
    rows = layout.index // mask.size(1)
    return states[rows, layout.positions[0]], layout


def enable_packing(model: nn.Module) -> None:
    """Let `model` compute packed rows, where its architecture is known to do it right."""
    if model.config.model_type in PACKABLE:
        model.set_attn_implementation(PACKED)


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)
