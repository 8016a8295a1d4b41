"""Log-probabilities of given tokens from hidden states, without a (tokens x vocabulary) tensor in fp32.

    N   positions       H   hidden units       V   vocabulary       logits = hidden @ weight.T (+ bias), (N, V)

Logits exist in the model's dtype, and in fp32 only for the few rows that a pass is working on. Up to `KEPT` of them are
kept for the backward pass; of more, one chunk exists at a time, and the backward pass computes it again.
The backward pass is written out: with p = softmax(logits / t), l = log p, and upstream gradients g of the
log-probability and e of the entropy S,

    d logits = (g (onehot - p) - e p (l + S)) / t
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.kernels import vocabulary as vocabulary_kernels
from utils.kernels.native import usable

CHUNK = 1 << 25  # logits of one matrix product: 64 MiB in 16 bits
KEPT = 1 << 26  # logits kept for the backward pass; if there are more, chunks are recomputed instead
BLOCK = {"cpu": 1 << 18}  # logits in fp32 at a time; on a CPU as many as its cache holds


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at `targets`, and the entropy of that distribution on request.

    Args:
        hidden: (N, H), the hidden state that predicts each target. targets: (N,) token ids.
        weight, bias: (V, H) and (V,) of the vocabulary projection.

    Returns:
        (N,) fp32 log-probabilities, and (N,) fp32 entropies in nats or None.
    """
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, with_entropy)
    return logprobs, entropy if with_entropy else None


def _parts(count: int, vocabulary: int, elements: int) -> Iterator[slice]:
    """Slices that cover `count` rows, of about `elements` logits each."""
    step = max(1, elements // vocabulary)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _blocks(logits: Tensor) -> Iterator[slice]:
    return _parts(*logits.shape, BLOCK.get(logits.device.type, CHUNK))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropy):
        count, vocabulary = len(hidden), len(weight)
        normalizer, at_target, entropy = (hidden.new_zeros(count, dtype=torch.float32) for _ in range(3))
        keeps = any(ctx.needs_input_grad[:3]) and count * vocabulary <= KEPT
        ctx.logits = {}
        for chunk in _parts(count, vocabulary, CHUNK):
            logits = F.linear(hidden[chunk], weight, bias)
            if keeps:
                ctx.logits[chunk.start] = logits
            if usable(logits):
                vocabulary_kernels.log_normalize(
                    logits, targets[chunk], temperature, normalizer=normalizer[chunk], at_target=at_target[chunk],
                    entropy=entropy[chunk] if with_entropy else None,
                )  # fmt: skip
                continue
            for block in _blocks(logits):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                wide = logits[block].float()
                if temperature != 1.0:
                    wide = wide / temperature  # not in place: `.float()` does not copy logits that are fp32
                normalizer[rows] = wide.logsumexp(-1)
                at_target[rows] = wide.gather(-1, targets[rows, None]).squeeze(-1)
                if with_entropy:
                    probabilities = (wide - normalizer[rows, None]).exp_()
                    entropy[rows] = normalizer[rows] - torch.linalg.vecdot(probabilities, wide)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return at_target - normalizer, entropy

    @staticmethod
    def backward(ctx, of_logprobs, of_entropy):
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        kept, ctx.logits = ctx.logits, {}  # overwritten below: a second backward pass computes them again
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normalizer)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = bias_gradient = None
        chunks = list(_parts(len(hidden), len(weight), CHUNK))
        for chunk in chunks:
            logits = kept.pop(chunk.start) if chunk.start in kept else F.linear(hidden[chunk], weight, bias)
            if usable(logits):
                vocabulary_kernels.log_normalize_backward(
                    logits, targets[chunk], ctx.temperature, normalizer=normalizer[chunk], entropy=entropy[chunk],
                    of_logprobs=of_logprobs[chunk], of_entropy=None if of_entropy is None else of_entropy[chunk],
                )  # fmt: skip
            else:
                for block in _blocks(logits):
                    rows = slice(chunk.start + block.start, chunk.start + block.stop)
                    wide = logits[block].float().div_(ctx.temperature).sub_(normalizer[rows, None])
                    gradient = wide.exp()
                    if of_entropy is None:
                        gradient *= -of_logprobs[rows, None]
                    else:
                        wide += entropy[rows, None]
                        gradient *= -(of_logprobs[rows, None] + of_entropy[rows, None] * wide)
                    gradient.scatter_add_(1, targets[rows, None], of_logprobs[rows, None])
                    logits[block] = gradient.div_(ctx.temperature)
            if needs_hidden:
                hidden_gradient[chunk] = logits @ weight
            if needs_weight:
                weight_gradient = _added(weight_gradient, logits.t() @ hidden[chunk], len(chunks))
            if needs_bias:
                bias_gradient = _added(bias_gradient, logits.sum(0), len(chunks))
        if needs_weight:
            weight_gradient = torch.zeros_like(weight) if not chunks else weight_gradient.to(weight.dtype)
        if needs_bias:
            bias_gradient = torch.zeros_like(bias) if not chunks else bias_gradient.to(bias.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _added(total: Tensor | None, part: Tensor, parts: int) -> Tensor:
    """`total + part`, in fp32 if there is more than one part."""
    if total is None:
        return part.float() if parts > 1 else part
    return total.add_(part)
