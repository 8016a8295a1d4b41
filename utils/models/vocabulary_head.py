"""The vocabulary projection of a causal language model, which can return log-probabilities instead of logits."""

import torch
from torch import nn

from utils.algorithms.logprobs import token_logprobs


class VocabularyHead(nn.Linear):
    """Replaces a model's output embedding and shares its parameters; without targets it behaves the same.

    The log-probabilities are computed inside the module's own forward, so that DeepSpeed's ZeRO-3 hooks gather the
    matrix once for the forward and once for the backward pass, however many chunks there are.
    """

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias  # the same parameters, partitioned or not

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (..., V) of hidden states (..., H); with `targets` (N,), `token_logprobs` of (N, H) states."""
        if targets is None:
            return super().forward(hidden)
        return token_logprobs(
            hidden, targets, self.weight, self.bias, temperature=temperature, with_entropy=with_entropy
        )
