"""One scalar per token: the class of the reward model and of the critic."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from utils.models.fused_layers import fuse_layers
from utils.models.packed_attention import enable_packing, token_states

HEAD = "score"  # the name that transformers gives to the head in its classes
HIDDEN_SIZE = "score_head_hidden_size"  # of the head, in config.json


class ScalarHead(nn.Linear):
    """A linear map to one number, computed in fp32 in every model: bf16 resolves a score of 3 to 1/64 only."""

    dropout = 0.0  # of its input, in training

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.float()
        if self.dropout and self.training:
            hidden = nn.functional.dropout(hidden, self.dropout)
        return nn.functional.linear(hidden, self.weight.float())


class HiddenHead(nn.Linear):
    """A hidden layer, tanh, and a `ScalarHead`, in fp32, as RoBERTa's head for classification has them.

    The hidden layer's matrix is this module's own, so that it is called `score.weight`, as the head that transformers
    makes: reading the folder, transformers finds another shape and stops. Under names that it does not know, it would
    start a random head, with a warning.
    """

    def __init__(self, in_features: int, hidden_size: int, **factory: Any) -> None:
        super().__init__(in_features, hidden_size, **factory)
        self.output = ScalarHead(hidden_size, 1, bias=False, **factory)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())
        return self.output(torch.tanh(hidden))


def hidden_size_of(model_config: PreTrainedConfig) -> int:
    """Width of the head's hidden layer; 0 for a linear head."""
    return getattr(model_config, HIDDEN_SIZE, None) or 0


def install_head(model: nn.Module, dropout: float = 0.0) -> None:
    """Give a `*ForSequenceClassification` the head that its config describes.

    A linear head keeps its parameter, partitioned or not. One with a hidden layer is new unless it is there already.
    """
    head, hidden_size = model.score, hidden_size_of(model.config)
    if not hidden_size:
        model.score = ScalarHead(head.in_features, 1, bias=False, device="meta")
        model.score.weight = head.weight
    elif not isinstance(head, HiddenHead):
        model.score = HiddenHead(head.in_features, hidden_size, device=head.weight.device, dtype=head.weight.dtype)
    (model.score.output if hidden_size else model.score).dropout = dropout


def with_hidden_head(model_class: type[nn.Module]) -> type[nn.Module]:
    """A `*ForSequenceClassification` whose instances are built with a `HiddenHead`, so that its weights are read too.

    It has the name of the original, which is what config.json records.
    """

    def build(self, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        self.score = HiddenHead(self.score.in_features, hidden_size_of(config))

    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


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
    Here the caller picks positions by mask. Its checkpoint opens in transformers as it is, unless its head has a hidden
    layer.

    Args:
        head_dropout: dropout in front of the head's last linear map, in training.
    """

    def __init__(self, model: nn.Module, *, head_dropout: float = 0.0):
        super().__init__()
        install_head(model, head_dropout)
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
