"""What a forward pass keeps for the backward pass: counted by running it on the meta device, where it costs nothing.

Every tensor that autograd saves passes through a hook. A model's layers are alike, so one layer's share is the
difference between a model of two layers and one of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from utils.arguments.roles import RoleFlags
from utils.kernels.attention import PackedAttention
from utils.kernels.native import DTYPES, library
from utils.models.fused_layers import unfuse_layers
from utils.models.on_meta import build_on_meta
from utils.models.packed_attention import Group
from utils.preflight.blocks import Blocks, blocks_of

COUNTED = "counted"


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward pass of the whole model, without the vocabulary head: `outside` the layers, and in each."""

    outside: Blocks
    layer: Blocks
    layers: int

    def scaled(self, factor: float) -> "Activations":
        """For `factor` times as many tokens."""
        return Activations(self.outside * factor, self.layer * factor, self.layers)


class _FusedAttention(torch.autograd.Function):
    """Saves what the fused kernels save: their inputs, the output, and a number per query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def count_activations(
    config: PreTrainedConfig,
    role: RoleFlags,
    dtype: str,
    *,
    sequences: int,
    width: int,
    device_type: str,
    uneven: bool = False,
) -> Activations:
    """Activations of `sequences` rows of `width` tokens each.

    Args:
        uneven: the real rows differ in length, so that the output of attention is concatenated from several parts.
        device_type: "cpu" or "cuda": they compute attention in different ways.
    """
    one, two = (
        _saved_by(build_on_meta(config, role, dtype, layers=layers), sequences, width, device_type, uneven)
        for layers in (1, 2)
    )
    layer = two - one
    return Activations(outside=one - layer, layer=layer, layers=config.num_hidden_layers)


def _saved_by(wrapped, sequences: int, width: int, device_type: str, uneven: bool) -> Blocks:
    wrapped.train()
    model = wrapped.model.base_model
    model.set_attn_implementation(COUNTED)
    if device_type != "cpu":  # a GPU runs transformers' own layers; the meta device would run the CPU's
        unfuse_layers(model)
    owned = {parameter.untyped_storage()._cdata for parameter in wrapped.parameters()}
    owned |= {buffer.untyped_storage()._cdata for buffer in wrapped.buffers()}
    count = sequences * width
    layout = _CountedLayout(device_type, Group(count, sequences, width, None), uneven)
    with torch.device("meta"):
        ids = torch.zeros(1, count, dtype=torch.long)
        positions = torch.zeros(1, count, dtype=torch.long)
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        saved = saved_storages(
            lambda: (
                model(
                    ids, attention_mask=no_mask, position_ids=positions, use_cache=False, layout=layout
                ).last_hidden_state
            )
        )
    return blocks_of(size for storage, size in saved.items() if storage not in owned)


@dataclass(frozen=True)
class _CountedLayout:
    """In place of `packed_attention.Layout`: one group of equal rows, and the device to estimate for."""

    device_type: str
    group: Group
    uneven: bool


def saved_storages(forward: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of each storage that autograd keeps for the backward pass of `forward`, by the storage's identity."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    del result
    return sizes


def _unfused_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    repeats = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value))
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, None, dropout, True)[0]


def _attend(module, query, key, value, attention_mask, *, layout: _CountedLayout, dropout: float = 0.0, **kwargs):
    """Saves the tensors that `packed_attention.attend_packed` saves on the device of `layout`."""
    group = layout.group
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.device_type == "cpu" and not dropout and query.dtype in DTYPES and library() is not None:
        boundaries = torch.zeros(group.sequences + 1, dtype=torch.int32)
        return PackedAttention.apply(query, key, value, boundaries, 1.0)[None], None
    query, key, value = (
        tensor.unflatten(0, (group.sequences, group.width)).transpose(1, 2) for tensor in (query, key, value)
    )
    if dropout and layout.device_type == "cpu":  # no fused CPU kernel supports dropout
        out = _unfused_attention(query, key, value, dropout)
    else:
        out = _FusedAttention.apply(query, key, value)
    out = out.transpose(1, 2).flatten(0, 1)
    return (out.clone() if layout.uneven else out)[None], None


AttentionInterface.register(COUNTED, _attend)
AttentionMaskInterface.register(COUNTED, sdpa_mask)
