"""The wrapper's log-probabilities against `transformers`' own forward, for every architecture."""

import pytest
import torch
import transformers
from processes import run_ranks
from tiny_models import SIZES, save_causal_lm

import utils.algorithms.logprobs as logprobs_module
from utils.models.causal_lm import find_own_logits
from utils.models.loading import load_causal_lm
from utils.parallel.zero import zero_config

ZERO = zero_config(0, "fp32")


def padded_batch(vocabulary_size: int):
    """Two left-padded, one right-padded and one full row; targets are the last four real tokens of each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary_size, (4, 12), generator=generator)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, :5], mask[1, :1], mask[2, 9:] = False, False, False
    targets = torch.zeros_like(mask)
    for row in range(4):
        targets[row, mask[row].nonzero().squeeze(1)[-4:]] = True
    return ids, mask, targets


@pytest.mark.parametrize("architecture", SIZES)
def test_logprobs_equal_transformers_row_by_row_without_padding(architecture, tiny_tokenizer, tmp_path):
    folder = save_causal_lm(tmp_path, tiny_tokenizer, architecture)
    model = load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32").eval()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, mask, targets = padded_batch(len(tiny_tokenizer))
    with torch.no_grad():
        found, entropy = model(ids, mask, targets, with_entropy=True)
        expected, expected_entropy = reference_logprobs(reference, ids, mask), []
        for row in range(4):
            real = ids[row][mask[row]][None]
            distribution = torch.log_softmax(reference(real).logits[0, :-1], -1)
            expected_entropy.append(-(distribution.exp() * distribution).sum(-1)[-4:])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=2e-5, rtol=1e-5)


def test_chunks_change_neither_values_nor_gradients(tiny_tokenizer, tmp_path, monkeypatch):
    model = load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32")
    batch = padded_batch(len(tiny_tokenizer))

    def value_and_gradients():
        model.zero_grad()
        logprobs, _ = model(*batch, temperature=0.7)
        logprobs.square().sum().backward()
        return logprobs.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    whole = value_and_gradients()
    monkeypatch.setattr(logprobs_module, "CHUNK", 3 * len(tiny_tokenizer))
    monkeypatch.setattr(logprobs_module, "KEPT", 0)
    torch.testing.assert_close(value_and_gradients(), whole, atol=1e-3, rtol=1e-3)


# Each scales the states before its head, or scales or clips the logits behind it; the second is recurrent.
OWN_LOGITS = {
    "Cohere": {"logit_scale": 0.25},
    "RecurrentGemma": {"logits_soft_cap": 1.0, "lru_width": 32, "num_hidden_layers": 3, "num_key_value_heads": 1},
    "FalconH1": {
        **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        **{"lm_head_multiplier": 0.2},
    },
    "MiniCPM3": {"num_key_value_heads": 4},
}


def reference_logprobs(reference, ids, mask) -> torch.Tensor:
    """Of the last four tokens of each row, by the model's own forward, one row at a time and without padding."""
    expected = []
    for row in range(len(ids)):
        real = ids[row][mask[row]][None]
        distribution = torch.log_softmax(reference(real).logits[0, :-1].float(), -1)
        expected.append(distribution.gather(1, real[0, 1:, None])[-4:, 0])
    return torch.cat(expected)


@pytest.mark.parametrize("name", OWN_LOGITS)
def test_an_architecture_that_transforms_its_logits_is_noticed_and_asked_for_them(name, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"vocab_size": len(tiny_tokenizer), "num_key_value_heads": 2, **sizes, **ids} | OWN_LOGITS[name]
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).eval()
    for parameter in reference.parameters():
        parameter.data.mul_(3.0)
    reference.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), tiny_tokenizer, ZERO, dtype="fp32").train()
    assert find_own_logits(model) and model.own_logits and model.training
    model.eval()
    ids, mask, targets = padded_batch(len(tiny_tokenizer))
    with torch.no_grad():
        expected = reference_logprobs(reference, ids, mask)
        torch.testing.assert_close(model(ids, mask, targets)[0], expected, atol=3e-3, rtol=1e-4)
        model.own_logits = False
        assert (model(ids, mask, targets)[0] - expected).abs().max() > 0.1, "the test must see a difference"


@pytest.mark.parametrize("architecture", SIZES)
def test_a_plain_head_is_recognised(architecture, tiny_tokenizer, tmp_path):
    model = load_causal_lm(
        str(save_causal_lm(tmp_path, tiny_tokenizer, architecture)), tiny_tokenizer, ZERO, dtype="bf16"
    )
    assert not find_own_logits(model) and not model.own_logits


def looked_at_on_each_rank(folder: str) -> bool:
    """Under ZeRO-3, where no rank has a whole weight."""
    from utils.arguments import SftConfig
    from utils.models.engine import build_engine
    from utils.models.tokenizer import load_tokenizer

    config = SftConfig(model_name_or_path=folder, zero_stage=3, dtype="fp32")
    engine = build_engine(config.roles()["model"], load_tokenizer(folder), config, total_steps=1)
    return engine.module.own_logits


@pytest.mark.parametrize("cap", [None, 3.0])
def test_partitioned_weights_are_looked_at_too(cap, tiny_tokenizer, tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=cap,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert run_ranks(looked_at_on_each_rank, 2, str(tmp_path)) == [cap is not None] * 2
