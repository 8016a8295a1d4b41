"""Chunked log-probabilities, with their hand-written backward pass, against the plain log-softmax under autograd."""

import pytest
import torch

import utils.algorithms.logprobs as module
from utils.algorithms.logprobs import token_logprobs
from utils.kernels.native import usable

WORDS = 50


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def operations(request, monkeypatch):
    """Every test runs on the compiled operations and on PyTorch's."""
    if request.param == "torch":
        monkeypatch.setattr(module, "usable", lambda tensor: False)
    elif not usable(torch.zeros(1)):
        pytest.skip("needs a C++ compiler")


def problem(dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, 8, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(WORDS, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, torch.randint(0, WORDS, (13,), generator=generator), weight, bias


def expected_values(hidden, targets, weight, bias=None, temperature=1.0):
    distribution = (torch.nn.functional.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
    return distribution[torch.arange(13), targets], -(distribution.exp() * distribution).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_softmax_at_the_targets_after_temperature(temperature):
    batch = problem()
    found = token_logprobs(*batch, temperature=temperature, with_entropy=True)
    torch.testing.assert_close(found, expected_values(*batch, temperature=temperature), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1 << 25, 1 << 26, 1 << 18), (150, 10_000, 100), (150, 0, 100), (1, 0, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_gradients_equal_autograd_whatever_the_sizes_of_chunks_and_blocks(sizes, bias, entropy_weight, monkeypatch):
    """The sizes are those of a matrix product, of what is kept for the backward pass, and of a block in fp32."""
    monkeypatch.setattr(module, "CHUNK", sizes[0])
    monkeypatch.setattr(module, "KEPT", sizes[1])
    monkeypatch.setattr(module, "BLOCK", {"cpu": sizes[2]})
    batch = problem(bias=bias)
    leaves = [tensor for tensor in batch if tensor is not None and tensor.requires_grad]
    upstream = torch.linspace(-1, 2, 13)
    gradients = []
    for logprobs, entropy in (
        token_logprobs(*batch, temperature=0.7, with_entropy=True),
        expected_values(*batch, temperature=0.7),
    ):
        loss = (upstream * logprobs).sum()
        if entropy_weight:
            loss = loss + entropy_weight * (upstream.flip(0) * entropy).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-5)


def test_a_second_backward_pass_gives_the_same(monkeypatch):
    batch = problem()
    loss = token_logprobs(*batch)[0].square().sum()
    first = torch.autograd.grad(loss, [batch[0], batch[2]], retain_graph=True)
    second = torch.autograd.grad(loss, [batch[0], batch[2]])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_frozen_matrix_gets_no_gradient_and_an_empty_batch_gets_zeros():
    hidden, targets, weight, _ = problem()
    frozen = weight.detach()
    (gradient,) = torch.autograd.grad(token_logprobs(hidden, targets, frozen)[0].sum(), hidden)
    (expected,) = torch.autograd.grad(token_logprobs(hidden, targets, weight)[0].sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    logprobs, _ = token_logprobs(hidden[:0], targets[:0], weight)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert logprobs.shape == (0,) and gradient.shape == weight.shape and not gradient.any()


def test_uniform_logits_have_the_highest_entropy():
    logprobs, entropy = token_logprobs(
        torch.zeros(3, 8), torch.tensor([0, 1, 2]), torch.randn(WORDS, 8), with_entropy=True
    )
    expected = torch.full((3,), float(WORDS)).log()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs, -expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_words_and_large_logits(dtype):
    """203 words do not fill the last vector; the identity's logits are the hidden states themselves."""
    logits = torch.randn(40, 203, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 40)[:, None]
    logits = logits.to(dtype).requires_grad_()
    targets = torch.arange(40) * 5 + 7
    found = token_logprobs(logits, targets, torch.eye(203, dtype=dtype), temperature=0.5, with_entropy=True)
    distribution = (logits.double() / 0.5).log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    expected = distribution[torch.arange(40), targets], entropy
    torch.testing.assert_close(found, tuple(value.float() for value in expected), rtol=1e-5, atol=1e-4)
    upstream = torch.linspace(-2, 1, 40)
    gradients = [
        torch.autograd.grad((upstream * logprob).sum() + 0.1 * entropy.sum(), logits)[0]
        for logprob, entropy in (found, expected)
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance / 10)


def test_log_probabilities_do_not_depend_on_whether_the_entropy_is_asked_for():
    """PPO scores without it and trains with it, and its first ratio is 1."""
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(1003, 16).bfloat16()
    with_entropy, without = (
        token_logprobs(hidden, torch.arange(9), weight, with_entropy=entropy)[0] for entropy in (True, False)
    )
    assert torch.equal(with_entropy, without)


def test_half_precision_logits_are_normalised_in_fp32():
    hidden, targets, weight, _ = problem(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, targets, weight)
    assert logprobs.dtype == torch.float32 and entropy is None
    torch.testing.assert_close(logprobs, expected_values(hidden, targets, weight)[0], rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(logprobs.sum(), weight)[0]
    expected = torch.autograd.grad(expected_values(hidden, targets, weight)[0].sum(), weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)


class _WidestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most fp32 elements that any operation returned."""

    widest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.widest = max(self.widest, result.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_exists_in_fp32():
    hidden, weight = torch.randn(512, 8).bfloat16().requires_grad_(), torch.randn(4096, 8).bfloat16().requires_grad_()
    with _WidestAllocation() as allocations:
        token_logprobs(hidden, torch.zeros(512, dtype=torch.long), weight, with_entropy=True)[0].sum().backward()
    assert 0 < allocations.widest <= module.BLOCK["cpu"] < 512 * 4096
