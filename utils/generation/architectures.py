"""A table of the architectures that the decode engine supports. A new one is a row, and a file if its parts differ.

What they share is the shape of LLaMA: a norm before attention and one before a gated MLP, rotary positions, grouped
key-value heads, and a norm before the head. Biases, head sizes and tied heads are read off the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that do not change with the length of the sequence


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer: two norms and seven linear layers."""

    input_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


def llama_parts(layer: nn.Module) -> LayerParts:
    """The parts of a layer whose modules are named as in LLaMA."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        input_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def has_llama_arithmetic(config: PreTrainedConfig) -> bool:
    """Whether activation, rotary table and products are those that the passes compute."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
        and getattr(config, "pretraining_tp", 1) == 1
    )


@dataclass(frozen=True)
class Architecture:
    """Where a `transformers` model keeps what the passes read.

    Attributes:
        accepts: whether a model with this configuration computes what the passes compute.
        parts: of one layer. layers: all of them, in order. final_norm: before the head. rotary: computes its tables.
    """

    accepts: Callable[[PreTrainedConfig], bool] = has_llama_arithmetic
    parts: Callable[[nn.Module], LayerParts] = llama_parts
    layers: Callable[[nn.Module], nn.ModuleList] = lambda model: model.model.layers
    final_norm: Callable[[nn.Module], nn.Module] = lambda model: model.model.norm
    rotary: Callable[[nn.Module], nn.Module] = lambda model: model.model.rotary_emb


ARCHITECTURES = {  # by `model_type`
    "llama": Architecture(),
}


def find_architecture(config: PreTrainedConfig) -> Architecture | None:
    """The row for a model with this configuration; None where `transformers` must generate."""
    known = ARCHITECTURES.get(config.model_type)
    return known if known is not None and known.accepts(config) else None
