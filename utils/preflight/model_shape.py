"""What a model of given flags holds, from its config.json alone: built on the meta device, without any data."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from utils.arguments.roles import RoleFlags
from utils.generation.decoder import supports
from utils.models.causal_lm import CausalLM
from utils.models.loading import set_dropout
from utils.models.lora import add_lora, find_linear_layers, lora_layers
from utils.models.scalar_head import ScalarHeadModel
from utils.parallel.zero import TORCH_DTYPES


@dataclass(frozen=True)
class Matrix:
    """A parameter: how many numbers, and whether it learns."""

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
    adapted: int  # in the matrices that have LoRA factors
    matrices: int  # in the linear layers, without heads
    cache_per_token: int  # numbers of keys and values of one token, all layers
    decodes: bool  # whether the decode engine knows the architecture

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


def build_on_meta(
    config: PreTrainedConfig, role: RoleFlags, dtype: str, *, tokens: int = 0, layers: int | None = None
) -> CausalLM | ScalarHeadModel:
    """The model that `models.loading` and `models.engine` would make, without data.

    Args:
        tokens: of the tokenizer; rows beyond the model's own are added as `--add_eot_token` adds them.
        layers: build this many instead of all.
    """
    config = copy.deepcopy(config)
    if tokens > config.vocab_size:
        config.vocab_size = 8 * math.ceil(tokens / 8)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    set_dropout(config, role.dropout)
    scalar = role.kind == "scalar"
    if scalar:
        config.num_labels = 1
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=TORCH_DTYPES[dtype])
        wrapped = ScalarHeadModel(model) if scalar else CausalLM(model)
        add_lora(
            model,
            role.lora_dim,
            module_name=role.lora_module_name,
            dropout=role.lora_dropout,
            only_lora=role.only_optimize_lora,
        )
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft gives factors the type of a matrix that has data
            parameter.data = parameter.data.to(TORCH_DTYPES[dtype])
    return wrapped


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
