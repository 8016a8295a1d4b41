"""LoRA through peft's layers, injected in place: the model keeps its class, its names and its own forward."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from utils.arguments.roles import RoleFlags
from utils.errors import InputError

ADAPTER = "default"
LoraGeneration = Literal["fused", "unfused"]  # in generation: merged into copies of matrices, or computed beside them


def find_linear_layers(model: nn.Module, patterns: str = "") -> list[str]:
    """Full names of the linear layers to adapt: those whose name contains one of the comma-separated `patterns`.

    With no pattern, all of them. Output heads (`lm_head`, `score`) are never adapted.

    Raises:
        InputError: nothing matches; the message lists names that exist.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    names = [name for name in names if not name.startswith("score.")]  # the layers of a head with a hidden layer
    names = [name for name in names if name.rpartition(".")[2] not in ("lm_head", "embed_out", "score")]
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    matching = [name for name in names if not wanted or any(pattern in name for pattern in wanted)]
    if not matching:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise InputError(
            f"--lora_module_name {patterns!r} matches no linear layer; this model has {', '.join(known)} "
            "(leave the flag empty to adapt all of them)"
        )
    return matching


def check_lora(config: PreTrainedConfig, role: RoleFlags) -> None:
    """Check the LoRA flags of a role against the architecture alone, before any weights are loaded.

    Raises:
        InputError: no layer matches; or the factors are larger than every matrix that they adapt.
    """
    is_language_model = role.kind == "causal_lm" or role.new_head
    auto_class = AutoModelForCausalLM if is_language_model else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=role.trust_remote_code)
    names = find_linear_layers(model, role.lora_module_name)
    largest = max(max(model.get_submodule(name).weight.shape) for name in names)
    if role.lora_dim > largest:
        raise InputError(
            f"--{role.prefix}lora_dim {role.lora_dim}: the matrices to adapt have up to {largest} rows and columns, so "
            "factors of this rank would be larger than the matrices; lower it"
        )


def add_lora(
    model: nn.Module,
    dim: int,
    *,
    module_name: str = "",
    alpha: float = 0,
    dropout: float = 0.0,
    only_lora: bool = False,
) -> None:
    """Adapt linear layers of `model` with LoRA factors of rank `dim`, in place; 0 does nothing.

    The adapted matrices are frozen. Other parameters train too unless `only_lora`; a scalar head always trains.

    Args:
        alpha: the update is scaled by alpha / dim; 0 stands for 2 * dim.

    Raises:
        InputError: `module_name` matches nothing.
    """
    if dim == 0:
        return
    names = find_linear_layers(model, module_name)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    transposed = isinstance(model.get_submodule(names[0]), Conv1D)  # GPT-2 stores (in, out)
    lora = LoraConfig(
        r=dim, lora_alpha=alpha or 2 * dim, lora_dropout=dropout, target_modules=names, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(lora, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        is_factor, is_adapted = "lora_" in name, ".base_layer." in name
        is_head = name.startswith("score.")
        parameter.requires_grad_(is_factor or is_head or (not only_lora and not is_adapted and name in trains))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before LoRA: the block runs without adapters; `requires_grad` flags stay as they are."""
    layers = list(lora_layers(model).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weight(layer: LoraLayer, adapter: str = ADAPTER) -> torch.Tensor:
    """W + (alpha / r) B A of one adapted layer, computed in fp32 into new memory; the layer itself is not touched.

    The weights must be whole: under ZeRO-3, call it inside `gathered(layer.parameters())`.
    """
    weight = layer.get_base_layer().weight
    update = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float() * layer.scaling[adapter]
    return (weight.float() + (update.T if layer.fan_in_fan_out else update)).to(weight.dtype)
