"""The compiled layers of training against those of transformers: values, gradients, and what they save."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from utils.kernels import training
from utils.kernels.native import usable
from utils.preflight.activations import saved_storages

pytestmark = pytest.mark.skipif(not usable(torch.zeros(1)), reason="needs a C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_and_gradients(function, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output of `function` in `dtype`, and the gradients of its inputs from a fixed one of the output; in fp64."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = function(*inputs)
    gradient = numbers(*output.shape, seed=99).to(torch.bfloat16).to(dtype)
    return [tensor.double() for tensor in (output.detach(), *torch.autograd.grad(output, inputs, gradient))]


def check(fused, reference, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """`fused` equals `reference` in fp32, and in bf16 is no further than it from `reference` in fp64."""
    inputs = [tensor.bfloat16().double() for tensor in inputs]
    found = values_and_gradients(fused, inputs, dtype)
    exact = values_and_gradients(reference, inputs, torch.float64)
    if dtype == torch.float32:
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
        return
    layers = values_and_gradients(reference, inputs, dtype)
    for ours, theirs, right in zip(found, layers, exact, strict=True):
        assert (ours - right).norm() <= 1.05 * (theirs - right).norm() + 1e-9
        torch.testing.assert_close(ours, right, atol=0.05, rtol=0.05)
    torch.testing.assert_close(found[0], layers[0], atol=0.0, rtol=2**-7)  # a unit in the last place,
    assert (found[0] != layers[0]).double().mean() < 0.03  # and only rarely: they round where transformers rounds


def norm_of_transformers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm; its formula where the reference is computed in fp64, which it would round to fp32."""
    if x.dtype == torch.float64:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    norm = LlamaRMSNorm(x.size(-1), eps=1e-5)
    norm.weight = torch.nn.Parameter(weight.detach())
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def rotary_of_transformers(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    heads = x.transpose(0, 1)[None]
    return apply_rotary_pos_emb(heads, heads, cos[None], sin[None])[0][0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 24), (7, 32), (70, 40), (33, 5)])
def test_rms_norm(rows, size, dtype):
    x = numbers(1, rows, size) * torch.logspace(-2, 2, rows)[:, None]
    check(lambda x, w: training.rms_norm(x, w, 1e-5), norm_of_transformers, [x, numbers(size, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 8), (5, 3, 48), (9, 2, 32), (4, 2, 64)])
def test_rotary(rows, heads, size, dtype):
    """The two halves of `cos` and `sin` differ here, so that the transposed map can be told from the opposite angle."""
    cos, sin = (numbers(rows, size, seed=seed).bfloat16().to(dtype) for seed in (1, 2))
    check(
        lambda x: training.rotary(x, cos, sin),
        lambda x: rotary_of_transformers(x, cos.to(x.dtype), sin.to(x.dtype)),
        [numbers(rows, heads, size)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (6, 16), (3, 5)])
def test_swiglu(rows, size, dtype):
    gate = numbers(1, rows, size) * 4
    check(training.swiglu, lambda g, u: torch.nn.functional.silu(g) * u, [gate, numbers(1, rows, size, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_linear(bias, dtype):
    parts = [numbers(1, 7, 40), numbers(1, 7, 40, seed=1), numbers(24, 40, seed=2) / 6]
    parts += [numbers(24, seed=3)] if bias else []

    def reference(gate, up, weight, bias=None):
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, weight, bias)

    check(lambda g, u, w, b=None: training.swiglu_linear(g, u, w, b), reference, parts, dtype)


def test_gate_saturates_without_nan():
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0] * 4]).requires_grad_()
    product = training.swiglu(gate, torch.full_like(gate, 3.0))
    product.sum().backward()
    assert product[0, :5].tolist() == [0, 0, 0, 270, 600]
    torch.testing.assert_close(gate.grad[0, :5], torch.tensor([0, 0, 1.5, 3, 3]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_neither_threads_nor_other_rows(dtype):
    """Large enough for the parallel loops, and for several partial sums of the weight's gradient."""
    x, weight = numbers(301, 136), numbers(136, seed=1)
    cos, sin = (numbers(301, 8, seed=seed).to(dtype) for seed in (2, 3))

    def layers(x, weight):
        normed = training.rms_norm(x, weight, 1e-6)
        return training.swiglu(training.rotary(normed.view(-1, 17, 8), cos[: len(x)], sin[: len(x)]).flatten(1), x)

    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(values_and_gradients(layers, [x, weight], dtype))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
    part = values_and_gradients(layers, [x[:1], weight], dtype)
    assert torch.equal(part[0], results[0][0][:1])


def test_frozen_weights_get_no_gradient():
    x, weight = numbers(3, 16).float().requires_grad_(), torch.ones(16)
    training.rms_norm(x, weight, 1e-6).sum().backward()
    matrix = torch.ones(4, 16)
    training.swiglu_linear(x, x, matrix, None).sum().backward()
    assert x.grad is not None and weight.grad is None and matrix.grad is None


def test_little_is_kept_for_the_backward_pass():
    """A norm keeps its input and a number per row; a gated matrix keeps gate, up and itself, not their product."""
    x = numbers(64, 32).bfloat16().requires_grad_()
    weight = torch.ones(32, dtype=torch.bfloat16).requires_grad_()
    kept = saved_storages(lambda: training.rms_norm(x, weight, 1e-6))
    assert sum(kept.values()) == 2 * 64 * 32 + 4 * 64 + 2 * 32
    kept_by_transformers = saved_storages(lambda: norm_of_transformers(x, weight))
    assert sum(kept_by_transformers.values()) > 2.5 * sum(kept.values())
    up, matrix = x.detach().clone().requires_grad_(), torch.ones(8, 32, dtype=torch.bfloat16).requires_grad_()
    kept = saved_storages(lambda: training.swiglu_linear(x, up, matrix, None))
    assert sum(kept.values()) == 2 * 64 * 32 * 2 + 2 * 8 * 32


def test_the_meta_device_gives_shapes():
    x = torch.zeros(5, 16, device="meta", requires_grad=True)
    y = training.swiglu(training.rms_norm(x, torch.ones(16, device="meta"), 1e-6), x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (5, 16)
