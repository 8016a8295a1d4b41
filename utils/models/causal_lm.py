"""The causal language model that trains: a `transformers` model whose forward answers in log-probabilities."""

import torch
from torch import nn

from utils import distributed
from utils.algorithms.logprobs import chunk_count, token_logprobs
from utils.algorithms.masking import position_ids
from utils.zero import is_partitioned

# Architectures with one of these scale or clip their logits after the head, so only their own forward is right.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class CausalLM(nn.Module):
    """Wraps a `transformers` causal LM; `forward` returns log-probabilities of the marked tokens only.

    The vocabulary projection runs on those positions alone and in chunks. Everything goes through this `forward`, and
    so through the DeepSpeed engine's hooks (gradient reduction, ZeRO-3 gathering).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        target_mask: torch.Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of `input_ids` where `target_mask` is true, each given the tokens before it.

        Args:
            input_ids, attention_mask, target_mask: (B, T), padded on either side; column 0 is never a target.

        Returns:
            (N,) fp32 log-probabilities in row-major order of the mask, and (N,) entropies or None.
        """
        predicting, targets = target_mask[:, 1:], input_ids[:, 1:][target_mask[:, 1:]]
        arguments = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask), "use_cache": False}
        if any(getattr(self.model.config, name, None) for name in LOGIT_TRANSFORMS):
            logits = self.model(input_ids, **arguments).logits[:, :-1][predicting]
            return token_logprobs(
                logits, targets, lambda piece: piece, temperature=temperature, with_entropy=with_entropy
            )
        hidden = self.model.base_model(input_ids, **arguments).last_hidden_state[:, :-1][predicting]
        head = self.model.get_output_embeddings()
        chunks = chunk_count(len(targets), head.out_features)
        if is_partitioned(
            head.weight
        ):  # every call of the head gathers it on all ranks, so they must call equally often
            chunks = int(distributed.all_reduce_scalar(chunks, "max"))
        return token_logprobs(hidden, targets, head, chunks=chunks, temperature=temperature, with_entropy=with_entropy)
