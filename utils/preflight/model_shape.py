"""The sizes of a model with given flags, from its config.json alone: built on the meta device, without any data."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from utils.arguments.roles import RoleFlags
from utils.generation.decoder import supports
from utils.models.lora import find_linear_layers, lora_layers
from utils.models.on_meta import build_on_meta


@dataclass(frozen=True)
class Matrix:
    """A parameter: how many numbers, and whether it trains."""

    numel: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model. Numbers of parameters, not bytes."""

    parameters: tuple[Matrix, ...]
    layers: int
    hidden: int
    vocabulary: int  # 0 where the model has no vocabulary head
    head_trains: bool
    adapted: int  # numbers in the matrices that have LoRA factors
    matrices: int  # numbers in the linear layers, without heads
    cache_per_token: int  # numbers of keys and values of one token, all layers
    decodes: bool  # whether the decode engine supports the architecture

    @property
    def total(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.trains)

    @property
    def largest(self) -> int:
        return max(parameter.numel for parameter in self.parameters)

    @property
    def largest_trainable(self) -> int:
        return max((parameter.numel for parameter in self.parameters if parameter.trains), default=0)


def model_shape(config: PreTrainedConfig, role: RoleFlags, dtype: str, *, tokens: int = 0) -> ModelShape:
    """Count what `build_on_meta` builds."""
    wrapped = build_on_meta(config, role, dtype, tokens=tokens)
    model = wrapped.model
    head = model.get_output_embeddings() if role.kind == "causal_lm" else None
    adapted = sum(layer.get_base_layer().weight.numel() for layer in lora_layers(model).values())
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelShape(
        parameters=tuple(Matrix(parameter.numel(), parameter.requires_grad) for parameter in wrapped.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=head.out_features if head is not None else 0,
        head_trains=head is not None and head.weight.requires_grad,
        adapted=adapted,
        matrices=_linear_numbers(model),
        cache_per_token=2 * config.num_hidden_layers * kv_heads * head_size,
        decodes=supports(model.config),
    )


def _linear_numbers(model: nn.Module) -> int:
    return sum(
        parameter.numel()
        for name in find_linear_layers(model)
        for part, parameter in model.get_submodule(name).named_parameters()
        if part == "weight" and "lora_" not in name
    )
