"""The compiled passes over logits (n, V), which need no fp32 copy of them; `usable` says if they can run."""

from torch import Tensor

from utils.kernels.calls import call


def log_normalize(
    logits: Tensor, targets: Tensor, temperature: float, *, normalizer: Tensor, at_target: Tensor,
    entropy: Tensor | None,
) -> None:  # fmt: skip
    """Fill (n,) fp32 tensors for l = logits / temperature: log sum e^l, l at the (n,) `targets`, and -sum p log p."""
    call(
        "log_normalize", logits, logits, targets.contiguous(), normalizer, at_target, entropy, *logits.shape,
        float(temperature),
    )  # fmt: skip


def log_normalize_backward(
    logits: Tensor, targets: Tensor, temperature: float, *, normalizer: Tensor, entropy: Tensor, of_logprobs: Tensor,
    of_entropy: Tensor | None,
) -> None:  # fmt: skip
    """Overwrite logits with their gradient, given those of the targets' log-probabilities and of the entropy, (n,)."""
    call(
        "log_normalize_backward", logits, logits, targets.contiguous(), normalizer, entropy,
        of_logprobs.contiguous(), None if of_entropy is None else of_entropy.contiguous(),
        *logits.shape, float(temperature),
    )  # fmt: skip
