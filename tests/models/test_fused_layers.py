"""A LLaMA with compiled layers against the same model with transformers' own."""

import copy

import pytest
import torch
import transformers
from tiny_models import SIZES

from utils.kernels import native
from utils.kernels.native import usable
from utils.models.causal_lm import CausalLM
from utils.models.fused_layers import FusedAttention, FusedMLP, FusedRMSNorm, GatedLinear, fuse_layers, unfuse_layers
from utils.models.lora import add_lora
from utils.models.packed_attention import token_states
from utils.models.scalar_head import ScalarHeadModel
from utils.preflight.activations import saved_storages

compiled = pytest.mark.skipif(not usable(torch.zeros(1)), reason="needs a C++ compiler")


def model_and_batch(dtype: torch.dtype, *, lora: int = 0, checkpointing: bool = False, **sizes):
    """A wrapped LLaMA with odd sizes, and rows of unequal lengths."""
    config = transformers.LlamaConfig(
        vocab_size=320, num_hidden_layers=2, max_position_embeddings=256, pad_token_id=0,
        **({"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1} | sizes),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(5.0 if "norm" not in name else torch.rand_like(parameter) + 0.5)
    if checkpointing:
        model.activation_checkpointing_enable()
    wrapped = CausalLM(model).train()
    add_lora(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    lengths = torch.tensor([150, 3, 148, 60, 1])
    mask = torch.arange(150) < lengths[:, None]
    return wrapped, (torch.randint(3, 320, (5, 150)), mask, mask & (torch.arange(150) > 0))


def results(wrapped, batch) -> list:
    logprobs, entropy = wrapped(*batch, with_entropy=True)
    wrapped.zero_grad()
    (logprobs.mean() + entropy.square().mean()).backward()
    gradients = {name: p.grad.double() for name, p in wrapped.named_parameters() if p.grad is not None}
    return [logprobs.detach().double(), gradients]


def plain(wrapped):
    """A copy with transformers' layers."""
    other = copy.deepcopy(wrapped)
    unfuse_layers(other)
    assert not any("Fused" in type(module).__name__ for module in other.modules())
    return other


@compiled
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [0, 4])
def test_log_probabilities_and_gradients_equal_those_of_the_plain_model(lora, checkpointing):
    wrapped, batch = model_and_batch(torch.float32, lora=lora, checkpointing=checkpointing)
    found, expected = results(wrapped, batch), results(plain(wrapped), batch)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 20
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@compiled
def test_bf16_is_as_near_to_fp64_as_the_plain_model():
    wrapped, batch = model_and_batch(torch.bfloat16, hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    exact = plain(wrapped).double()
    exact.model.set_attn_implementation("sdpa")
    found, theirs, right = results(wrapped, batch), results(plain(wrapped), batch), results(exact, batch)

    def error(of):
        far = [(of[1][name] - right[1][name]).norm() / right[1][name].norm() for name in right[1]]
        return (of[0] - right[0]).norm() / right[0].norm(), sum(far) / len(far)

    assert all(ours < 1.1 * other for ours, other in zip(error(found), error(theirs), strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_training_give_the_same_bits(dtype):
    """PPO's first ratio is 1: a pass without gradients computes the same numbers."""
    wrapped, batch = model_and_batch(dtype)
    trained, _ = wrapped(*batch)
    with torch.no_grad():
        scored, _ = wrapped(*batch)
    assert torch.equal(trained, scored)


@compiled
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.75), (torch.bfloat16, 0.65)])
def test_less_is_kept_for_the_backward_pass(dtype, share):
    wrapped, (ids, mask, _) = model_and_batch(dtype, hidden_size=96, intermediate_size=256, num_attention_heads=6)

    def kept(of) -> int:
        owned = {parameter.untyped_storage()._cdata for parameter in of.parameters()}
        saved = saved_storages(lambda: token_states(of.model.base_model, ids, mask)[0])
        return sum(size for storage, size in saved.items() if storage not in owned)

    assert kept(wrapped) < share * kept(plain(wrapped))


def test_without_the_library_the_model_is_transformers_own(monkeypatch):
    wrapped, batch = model_and_batch(torch.float32)
    fused = results(wrapped, batch)
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    try:
        assert not usable(torch.zeros(1))
        off, expected = results(wrapped, batch), results(plain(wrapped), batch)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    torch.testing.assert_close(off, expected, atol=0.0, rtol=0.0)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-4)


def test_names_and_hooks_of_the_layers_stay():
    """DeepSpeed's hooks sit on the modules, and checkpoints know parameters by name."""
    config = SIZES["llama"](320)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    names = list(reference.state_dict())
    seen = []
    for module in reference.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    wrapped = CausalLM(reference)
    assert list(reference.state_dict()) == names
    ids = torch.arange(3, 15)[None]
    wrapped(ids, torch.ones_like(ids), torch.arange(12)[None] > 0)
    assert [seen.count(kind) for kind in (FusedRMSNorm, FusedMLP, FusedAttention, GatedLinear)] == [5, 2, 2, 2]


def test_generation_of_transformers_still_works():
    """A call without a layout, with a cache."""
    wrapped, _ = model_and_batch(torch.float32)
    prompt = torch.randint(3, 320, (2, 6))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = wrapped.model.generate(prompt, attention_mask=mask, **arguments)
    assert torch.equal(found, plain(wrapped).model.generate(prompt, attention_mask=mask, **arguments))


def test_other_layers_are_left_alone():
    """A gate that is not silu, and an architecture with its own classes."""
    config = SIZES["llama"](320)
    config.hidden_act = "gelu"
    model = transformers.AutoModelForCausalLM.from_config(config)
    fuse_layers(model)
    assert type(model.model.layers[0].mlp) is transformers.models.llama.modeling_llama.LlamaMLP
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    other = transformers.AutoModelForCausalLM.from_config(SIZES["phi"](320))
    kinds = [type(module) for module in other.modules()]
    fuse_layers(other)
    assert [type(module) for module in other.modules()] == kinds


@compiled
def test_fp16_and_mixed_types_take_transformers_forward():
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(16)
    x = torch.randn(3, 16)
    norm.__class__ = FusedRMSNorm
    assert norm(x.bfloat16()).dtype == torch.float32  # weights in fp32 promote, as in transformers
    assert norm.half()(x.half()).dtype == torch.float16


@compiled
def test_scores_of_a_reward_model_equal_those_of_the_plain_one():
    config = SIZES["llama"](320)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    wrapped = ScalarHeadModel(transformers.AutoModelForSequenceClassification.from_config(config))
    ids, mask = torch.randint(3, 320, (3, 20)), torch.arange(20) < torch.tensor([[20], [4], [13]])
    torch.testing.assert_close(wrapped(ids, mask), plain(wrapped)(ids, mask), atol=1e-5, rtol=1e-5)
