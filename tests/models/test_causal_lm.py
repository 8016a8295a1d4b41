"""The wrapper's log-probabilities against `transformers`' own forward, for every architecture."""

import pytest
import torch
import transformers
from tiny_models import SIZES, save_causal_lm

import utils.algorithms.logprobs as logprobs_module
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
        expected, expected_entropy = [], []
        for row in range(4):
            real = ids[row][mask[row]][None]
            distribution = torch.log_softmax(reference(real).logits[0, :-1], -1)
            expected.append(distribution.gather(1, real[0, 1:, None])[-4:, 0])
            expected_entropy.append(-(distribution.exp() * distribution).sum(-1)[-4:])
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
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


def test_scaled_logits_go_through_the_models_own_forward(tiny_tokenizer, tmp_path):
    config = transformers.CohereConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0,
    )  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), tiny_tokenizer, ZERO, dtype="fp32").eval()
    ids, mask, targets = padded_batch(len(tiny_tokenizer))
    row = slice(3, 4)
    with torch.no_grad():
        found, _ = model(ids[row], mask[row], targets[row])
        expected = torch.log_softmax(reference(ids[row]).logits[0, :-1], -1).gather(1, ids[3, 1:, None])[-4:, 0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
