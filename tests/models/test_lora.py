"""LoRA: what it adapts, what trains, and that neither switching nor merging touches the base weights."""

import hashlib

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from step_scripts import flags, run_step
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments.roles import RoleFlags
from utils.errors import InputError
from utils.models.checks import load_config
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.models.lora import adapters_off, add_lora, check_lora, find_linear_layers, lora_layers
from utils.models.saving import merged_state_dict
from utils.parallel.zero import zero_config

ZERO = zero_config(0, "fp32")


@pytest.fixture
def model(tiny_tokenizer, tmp_path):
    return load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32").model


def randomize_factors(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_empty_name_adapts_every_linear_layer_but_the_head(model):
    names = {name.rpartition(".")[2] for name in find_linear_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_names_of_conv1d_layers_are_found(tiny_tokenizer, tmp_path):
    gpt2 = load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer, "gpt2")), tiny_tokenizer, ZERO, dtype="fp32")
    assert {name.rpartition(".")[2] for name in find_linear_layers(gpt2.model)} == {"c_attn", "c_proj", "c_fc"}


def test_comma_separated_names_and_no_match(model, tmp_path):
    assert len(find_linear_layers(model, "q_proj, k_proj")) == 4
    with pytest.raises(InputError, match=r"decoder\.layers.*q_proj"):
        find_linear_layers(model, "decoder.layers.")
    config = load_config(str(tmp_path), "--model_name_or_path")
    with pytest.raises(InputError, match="matches no linear layer"):
        check_lora(config, RoleFlags(name="m", kind="causal_lm", path="", path_flag="", lora_module_name="decoder."))
    with pytest.raises(InputError, match=r"--actor_lora_dim 65: .* up to 64 rows and columns"):
        check_lora(config, RoleFlags(name="m", kind="causal_lm", path="", path_flag="", prefix="actor_", lora_dim=65))
    check_lora(config, RoleFlags(name="m", kind="causal_lm", path="", path_flag="", lora_dim=64))


def test_what_trains(model):
    add_lora(model, 4, module_name="q_proj")
    names = trainable(model)
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" not in names
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"} <= names
    assert sum("lora_" in name for name in names) == 4


def test_only_lora_still_trains_the_scalar_head(tiny_tokenizer, tmp_path):
    folder = str(save_reward_model(tmp_path, tiny_tokenizer))
    reward = load_scalar_model(folder, tiny_tokenizer, ZERO, dtype="fp32").model
    add_lora(reward, 4, only_lora=True)
    assert {name for name in trainable(reward) if "lora_" not in name} == {"score.weight"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_give_the_adapted_model(architecture, tiny_tokenizer, tmp_path):
    folder = str(save_causal_lm(tmp_path, tiny_tokenizer, architecture))
    adapted = load_causal_lm(folder, tiny_tokenizer, ZERO, dtype="fp32").model.eval()
    add_lora(adapted, 4, alpha=3)
    randomize_factors(adapted)
    plain = load_causal_lm(folder, tiny_tokenizer, ZERO, dtype="fp32").model.eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert (adapted(ids).logits - plain(ids).logits).abs().max() > 0.1
        plain.load_state_dict(merged_state_dict(adapted))
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_off_is_the_base_model_and_leaves_gradients_on(model):
    ids = torch.arange(3, 13)[None]
    before = model.eval()(ids).logits
    add_lora(model, 4)
    randomize_factors(model)
    trains = trainable(model)
    with adapters_off(model):
        assert torch.equal(model(ids).logits, before)
        assert trainable(model) == trains
    assert not torch.allclose(model(ids).logits, before)


def test_thousand_merges_and_switches_leave_the_base_weights_bit_identical(model):
    model.bfloat16()
    add_lora(model, 2, module_name="q_proj")
    randomize_factors(model)
    base = [layer.get_base_layer().weight for layer in lora_layers(model).values()]

    def digest():
        return hashlib.sha256(b"".join(w.detach().float().numpy().tobytes() for w in base)).hexdigest()

    before = digest()
    for _ in range(1000):
        with adapters_off(model):
            pass
    for _ in range(20):
        merged_state_dict(model)
    assert digest() == before


SIZES_OF_A_RUN = {"max_steps": 2, "lora_dim": 4, "lora_learning_rate": 1e-2, "save_adapter": True, "dtype": "fp32"}


@pytest.mark.parametrize("only_lora", [True, False], ids=["adapters-alone", "with-the-rest"])
@pytest.mark.parametrize(("step", "tied"), [(1, False), (1, True), (2, False)], ids=["sft", "sft-tied", "reward"])
def test_peft_makes_the_trained_model_of_the_base_and_the_saved_adapter(
    world, tmp_path, tiny_tokenizer, step, tied, only_lora
):
    """All that was trained is in the adapter: without the reward model's head it would score with a random one."""
    base = save_causal_lm(tmp_path / "base", tiny_tokenizer, "tied_llama" if tied else "llama")
    out = tmp_path / "out"
    run_step(step, flags(
        world, step, out, model_name_or_path=base, only_optimize_lora=only_lora, learning_rate=1e-2, **SIZES_OF_A_RUN
    ))  # fmt: skip
    ids = torch.arange(3, 15)[None]
    auto, peft_auto, options = transformers.AutoModelForCausalLM, AutoPeftModelForCausalLM, {}
    if step == 2:
        auto, peft_auto = transformers.AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification
        options = {"num_labels": 1}
    with torch.no_grad():
        expected = auto.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
        for seed in (0, 1):  # of a new head
            torch.manual_seed(seed)
            plain = auto.from_pretrained(base, dtype=torch.float32, pad_token_id=0, **options).eval()
            assert (plain(ids).logits - expected).abs().max() > 1e-3
            adapted = PeftModel.from_pretrained(plain, out / "adapter").eval()
            torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-4, rtol=1e-4)
        named = peft_auto.from_pretrained(out / "adapter", dtype=torch.float32, pad_token_id=0, **options).eval()
        torch.testing.assert_close(named(ids).logits, expected, atol=1e-4, rtol=1e-4)
