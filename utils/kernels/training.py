"""The compiled layers of training and scoring, with their gradients.

Each saves little more than its inputs for the backward pass, whereas the operations that it replaces save fp32 copies
of intermediate results. `usable` says if they can run on a tensor; on the meta device they return shapes and save the
same tensors as elsewhere. Notation as in `training.cpp`: n tokens, H hidden units, I units between gate and down, D of
a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.calls import call

PART = 32  # rows of one partial sum of the norm's weight gradient, as in training.cpp


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        size = x.size(-1)
        outputs, scales = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        call("rms_norm", x, x, weight, outputs, scales, scales.numel(), size, eps)
        ctx.save_for_backward(x, weight, scales)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, scales = ctx.saved_tensors
        rows, size, of_x, of_weight, sums = scales.numel(), x.size(-1), torch.empty_like(x), None, None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight)
            sums = x.new_zeros(-(-rows // PART), size, dtype=torch.float32)
        gradient = gradient.contiguous()
        call("rms_norm_backward", x, gradient, x, weight, scales, of_x, of_weight, sums, rows, size)
        return of_x, of_weight, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _turned(gradient, *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x.contiguous()
    outputs = torch.empty_like(x)
    call("rotary", x, x, cos, sin, outputs, *x.shape, int(back))
    return outputs


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _gated_backward(gradient.contiguous(), *ctx.saved_tensors, None)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        return F.linear(_gated(gate, up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        gate, up, weight = ctx.saved_tensors
        _, _, needs_weight, needs_bias = ctx.needs_input_grad
        product = gradient @ weight  # the product's gradient, then overwritten by the product itself
        of_gate, of_up = _gated_backward(product, gate, up, product if needs_weight else None)
        rows = gradient.flatten(0, -2)
        of_weight = rows.t() @ product.flatten(0, -2) if needs_weight else None
        return of_gate, of_up, of_weight, rows.sum(0) if needs_bias else None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    outputs = torch.empty_like(gate)
    call("swiglu", gate, gate, up, outputs, gate.numel() // gate.size(-1), gate.size(-1))
    return outputs


def _gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    rows, size = gate.numel() // gate.size(-1), gate.size(-1)
    call("swiglu_backward", gate, gradient, gate, up, of_gate, of_up, product, rows, size)
    return of_gate, of_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight (H,) * x (..., H) / its root mean square (Zhang and Sennrich 2019, equation 4)."""
    return _RmsNorm.apply(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (n, heads, D) rotated by their positions (Su et al. 2021, equation 34); cos and sin (n, D)."""
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (..., I) (Shazeer 2020, equation 6)."""
    return _Swiglu.apply(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(swiglu(gate, up), weight, bias)`, which recomputes the product in backward rather than save it."""
    return _SwigluLinear.apply(gate, up, weight, bias)
