"""One scalar per token: the class of the reward model and of the critic."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from utils.models.fused_layers import fuse_layers
from utils.models.packed_attention import enable_packing, token_states


class ScalarHead(nn.Linear):
    """A linear map to one number, computed in fp32 in every model: bf16 resolves a score of 3 to 1/64 only."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


def store_score_scale(model_config: PreTrainedConfig, mean: float, std: float) -> None:
    """Store mean and standard deviation of the scores of good answers in the config that `save_model` writes."""
    model_config.score_mean, model_config.score_std = mean, std


def score_scale(model_config: PreTrainedConfig) -> tuple[float, float] | None:
    """What `store_score_scale` has stored; None without it, or where a single pair gave a standard deviation of 0."""
    mean, deviation = getattr(model_config, "score_mean", None), getattr(model_config, "score_std", None)
    return None if mean is None or not deviation else (float(mean), float(deviation))


class ScalarHeadModel(nn.Module):
    """Wraps a `transformers` `*ForSequenceClassification` with one label; `forward` gives its score at every token.

    transformers' own forward looks for the last id that is not the pad id, which is wrong where pad and eos share one.
    Here the caller picks positions by mask. Its checkpoint opens in transformers as it is.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        head = ScalarHead(model.score.in_features, 1, bias=False, device="meta")
        head.weight = model.score.weight  # the same parameter, partitioned or not
        model.score = head
        enable_packing(model)
        fuse_layers(model)
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, prompt_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T) ids and mask -> (B, T) fp32 scores, 0 on padding; a column's score depends on the tokens up to it.

        Args:
            prompt_lengths: (B/2,) the first tokens that rows i and B/2 + i of a batch padded on the right have in
                common; they are computed once, where the architecture is packed.
        """
        states, layout = token_states(self.model.base_model, input_ids, attention_mask, prompt_lengths)
        scores = layout.of_tokens(self.model.score(states).squeeze(-1))
        blank = torch.zeros(input_ids.numel(), dtype=scores.dtype, device=scores.device)
        return blank.index_copy(0, layout.index, scores).view_as(input_ids)
