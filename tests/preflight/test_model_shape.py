"""Counts on the meta device against real models: parameters to the last one, saved activations to the last byte."""

import copy

import pytest
import torch
import transformers
from tiny_models import SIZES

from utils.arguments.roles import Kind, RoleFlags
from utils.kernels.native import usable
from utils.models import fused_layers
from utils.models.causal_lm import CausalLM
from utils.models.loading import set_dropout
from utils.models.lora import add_lora
from utils.models.packed_attention import token_states
from utils.models.scalar_head import ScalarHeadModel
from utils.parallel.zero import TORCH_DTYPES
from utils.preflight.activations import count_activations, saved_storages
from utils.preflight.model_shape import model_shape


def role_flags(kind: Kind = "causal_lm", **changes) -> RoleFlags:
    return RoleFlags(name="model", kind=kind, path="somewhere", path_flag="--model_name_or_path", **changes)


def real_model(config, flags: RoleFlags, dtype: str):
    """The model with data that `flags` describe, made as loading and training make it."""
    config = copy.deepcopy(config)
    set_dropout(config, flags.dropout)
    scalar = flags.kind == "scalar"
    if scalar:
        config.num_labels, config.pad_token_id = 1, 0
    auto_class = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=TORCH_DTYPES[dtype])
    wrapped = ScalarHeadModel(model) if scalar else CausalLM(model)
    add_lora(
        model,
        flags.lora_dim,
        module_name=flags.lora_module_name,
        dropout=flags.lora_dropout,
        only_lora=flags.only_optimize_lora,
    )
    return wrapped.train()


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("kind", ["causal_lm", "scalar"])
@pytest.mark.parametrize(
    "lora", [{}, {"lora_dim": 4}, {"lora_dim": 4, "only_optimize_lora": True}], ids=["full", "lora", "only"]
)
def test_parameters_are_those_of_the_real_model(architecture, kind, lora):
    flags = role_flags(kind, **lora)
    shape = model_shape(SIZES[architecture](320), flags, "fp32")
    real = [(p.numel(), p.requires_grad) for p in real_model(SIZES[architecture](320), flags, "fp32").parameters()]
    assert [(p.numel, p.trains) for p in shape.parameters] == real
    assert shape.total == sum(numel for numel, _ in real)


def test_parameters_of_a_llama_by_hand():
    """GQA with 4 query and 2 key-value heads of 8: per layer 2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 64 + 2 x 32."""
    shape = model_shape(SIZES["llama"](320), role_flags(), "bf16")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert shape.total == shape.trainable == 2 * layer + 2 * 320 * 32 + 32
    assert shape.cache_per_token == 2 * 2 * 2 * 8
    assert shape.matrices == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    tied = model_shape(SIZES["tied_llama"](320), role_flags(), "bf16")
    assert tied.total == 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 320 * 32 + 32


def test_rows_for_added_tokens_are_counted():
    grown, whole = (model_shape(SIZES["llama"](320), role_flags(), "fp32", tokens=tokens) for tokens in (321, 320))
    assert grown.total - whole.total == 2 * 8 * 32


@pytest.mark.parametrize(
    ("architecture", "dtype", "changes"),
    [
        ("llama", "fp32", {}),
        ("llama", "bf16", {}),
        ("llama", "bf16", {"lora_dim": 4}),
        ("llama", "fp32", {"lora_dim": 4, "only_optimize_lora": True, "lora_dropout": 0.1}),
        ("tied_llama", "fp32", {}),
        ("opt", "fp32", {}),
        ("opt", "fp32", {"dropout": 0.1}),
        ("gpt2", "fp32", {}),
        ("gpt_neox", "bf16", {}),
        ("phi", "fp32", {}),
        ("llama", "fp32", {"kind": "scalar"}),
    ],
)
@pytest.mark.parametrize("width", [64, 256])
def test_saved_activations_are_those_of_a_real_forward_pass(architecture, dtype, changes, width):
    """Attention in bf16 by matrix products, in fp32 by the fused kernel, and with dropout by neither."""
    flags = role_flags(**({"dropout": 0.0} | changes))
    config = SIZES[architecture](320)
    config.num_hidden_layers = 3
    counted = count_activations(config, flags, dtype, sequences=4, width=width, device_type="cpu")
    wrapped = real_model(config, flags, dtype)
    ids = torch.randint(3, 300, (4, width))
    saved = saved_storages(lambda: token_states(wrapped.model.base_model, ids, torch.ones_like(ids))[0])
    owned = {tensor.untyped_storage()._cdata for tensor in [*wrapped.parameters(), *wrapped.buffers()]}
    real = sum(size for storage, size in saved.items() if storage not in owned)
    # the meta device gives moments of a LayerNorm in bf16 32 bits, a CPU 16
    assert (counted.outside + counted.layer * 3).total == pytest.approx(real, rel=0.015)


@pytest.mark.skipif(not usable(torch.zeros(1)), reason="needs a C++ compiler")
def test_only_a_cpu_with_the_compiled_layers_is_counted_with_them(monkeypatch):
    flags = role_flags(dropout=0.0)

    def bytes_of_a_layer(device_type: str) -> float:
        config = SIZES["llama"](320)
        return count_activations(config, flags, "bf16", sequences=4, width=64, device_type=device_type).layer.total

    compiled, on_gpu = bytes_of_a_layer("cpu"), bytes_of_a_layer("cuda")
    monkeypatch.setattr(fused_layers, "library", lambda: None)
    assert bytes_of_a_layer("cuda") == on_gpu
    assert bytes_of_a_layer("cpu") > 1.5 * compiled
