"""Chunked log-probabilities against the plain log-softmax."""

import pytest
import torch

from utils.algorithms.logprobs import LOGITS_PER_CHUNK, chunk_count, token_logprobs


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.nn.Linear(8, 50, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 8, generator=generator))
    return hidden, torch.randint(0, 50, (13,), generator=generator), head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_softmax_at_the_targets_after_temperature(temperature):
    hidden, targets, head = problem()
    expected = (head(hidden) / temperature).log_softmax(-1)
    logprobs, entropy = token_logprobs(hidden, targets, head, temperature=temperature, with_entropy=True)
    torch.testing.assert_close(logprobs, expected[torch.arange(13), targets], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [2, 5, 13, 20])
def test_chunks_change_neither_values_nor_gradients(chunks):
    hidden, targets, head = problem()
    results = []
    for count in (1, chunks):
        logprobs, entropy = token_logprobs(hidden, targets, head, chunks=count, with_entropy=True)
        gradients = torch.autograd.grad((logprobs + 0.3 * entropy).sum(), [hidden, head.weight])
        results.append((logprobs, entropy, *gradients))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5)


def test_uniform_logits_have_the_highest_entropy():
    hidden, targets, head = torch.zeros(3, 8), torch.tensor([0, 1, 2]), torch.nn.Linear(8, 50, bias=False)
    logprobs, entropy = token_logprobs(hidden, targets, head, with_entropy=True)
    expected = torch.full((3,), 50.0).log()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs, -expected, rtol=0, atol=1e-5)


def test_half_precision_logits_are_normalised_in_fp32():
    hidden, targets, head = problem(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, targets, head)
    expected = head(hidden).float().log_softmax(-1)[torch.arange(13), targets]
    assert logprobs.dtype == torch.float32 and entropy is None
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_chunk_count_bounds_the_logits_alive_at_once():
    assert chunk_count(1, 50) == chunk_count(0, 50) == 1
    for tokens, vocabulary in ((2048, 32000), (100_000, 128_256)):
        per_chunk = -(-tokens // chunk_count(tokens, vocabulary))
        assert per_chunk * vocabulary <= LOGITS_PER_CHUNK + vocabulary
