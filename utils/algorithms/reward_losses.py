"""Losses of the reward model: each measures, for every pair, how wrong the order of its two responses is.

A loss is a function of `Pairs` and a row of `PAIRWISE_LOSSES` in `utils.arguments.choices`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.algorithms.masking import last_index, masked_sum

ROWS_OF_BOTH = ("values", "input_ids", "attention_mask", "response_mask")  # fields of `Pairs` with 2B rows


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The model's values for B pairs, in rows padded on the right: B chosen responses, then their B rejected ones."""

    values: Tensor  # (2B, T), a number per token
    input_ids: Tensor  # (2B, T)
    attention_mask: Tensor  # (2B, T), true on prompt and response
    response_mask: Tensor  # (2B, T)
    row_mask: Tensor  # (B,), false for pairs that only fill up a batch
    margin: Tensor  # (B,), how much higher the chosen response is to score; 0 for no margin
    source: Tensor  # (B,), number of the data set that the pair comes from

    @classmethod
    def of(cls, values: Tensor, batch: Mapping[str, Tensor]) -> "Pairs":
        """The values for a batch that has the other fields, and maybe more."""
        return cls(values=values, **{field.name: batch[field.name] for field in fields(cls) if field.name != "values"})

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected responses, (B,) each: the number at the last response token."""
        scores = self.values.gather(1, last_index(self.response_mask)[:, None]).squeeze(1)
        return scores.chunk(2)

    def swapped(self) -> "Pairs":
        """The same responses, labelled the other way round; the margin changes its sign with the difference."""
        rows = {name: _swap_halves(getattr(self, name)) for name in ROWS_OF_BOTH}
        return replace(self, margin=-self.margin, **rows)


def total_loss(
    loss: Callable[[Pairs], Tensor],
    pairs: Pairs,
    *,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
) -> Tensor:
    """A loss of `PAIRWISE_LOSSES` with what can be added to each of them; with the defaults, the loss itself.

        (1 - label_smoothing) loss(pair) + label_smoothing loss(swapped pair) + center_coefficient centering_penalty

    The first two terms, with -log sigmoid(d) as the loss -(1 - e) log sigmoid(d) - e log sigmoid(-d), are for labels of
    which a share e is wrong (Mitchell 2023, "A note on DPO with noisy preferences", with a score for DPO's log-ratio).

    Args:
        margin: of every pair, added to its own. label_smoothing: between 0 and 1/2.
    Returns:
        (B,) fp32.
    """
    if margin:
        pairs = replace(pairs, margin=pairs.margin + margin)
    losses = loss(pairs)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * loss(pairs.swapped())
    if center_coefficient:
        losses = losses + center_coefficient * centering_penalty(*pairs.scores)
    return losses


def centering_penalty(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(chosen + rejected)^2 per pair, (B,) fp32: it is 0 where the two scores lie around zero.

    The loss of a pair depends on the difference alone and lets scores drift together (Eisenstein et al. 2023, "Helping
    or herding?"; TRL's `center_rewards_coefficient`).
    """
    return (chosen_scores.float() + rejected_scores.float()).square()


def last_token_loss(pairs: Pairs) -> Tensor:
    """`pairwise_loss` of the scores, (B,) fp32."""
    return pairwise_loss(*pairs.scores, pairs.margin)


def token_span_loss(pairs: Pairs) -> Tensor:
    """`token_span_pairwise_loss` of the values, (B,) fp32."""
    sides = (pairs.values, pairs.input_ids, pairs.attention_mask)
    return token_span_pairwise_loss(*(part for side in sides for part in side.chunk(2)), pairs.margin)


def pairwise_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) per pair, in fp32.

    Bradley-Terry (Ouyang et al. 2022, equation 1), with a margin for pairs of which one response is clearly better
    (Touvron et al. 2023, "Llama 2", equation 2).

    Args:
        chosen_scores, rejected_scores: (B,) scores of the last response token.
        margin: (B,), or one number for all.
    Returns:
        (B,) fp32.
    """
    return -F.logsigmoid(chosen_scores.float() - rejected_scores.float() - margin)


def token_span_pairwise_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    margin: Tensor | None = None,
) -> Tensor:
    """DeepSpeed-Chat's loss: the pairwise loss of every column in the span where the two sequences differ, averaged.

        chosen     p  p  a  b  E           span: first difference to the end of the longer sequence
        rejected   p  p  c  E  .
                         [-----]           in the last column the rejected side keeps the value of its own last token

    The original compares the values that the model gives to padding in the columns after the end of the shorter
    response, which teaches it length. Here the shorter response holds its last value instead; with equal lengths the
    two agree. Identical sequences are compared in their last token.

    Args:
        chosen_values, rejected_values: (B, T) value per token.
        chosen_ids, rejected_ids: (B, T) token ids, prompt first, right-padded, both to the same width.
        chosen_mask, rejected_mask: (B, T) attention masks, true on the prompt and the response.
        margin: (B,), subtracted from the difference of every column.
    Returns:
        (B,) fp32, the mean over each pair's span.
    """
    columns = torch.arange(chosen_ids.size(1), device=chosen_ids.device)
    chosen_mask, rejected_mask = chosen_mask.bool(), rejected_mask.bool()
    either = chosen_mask | rejected_mask
    differs = either & ((chosen_ids != rejected_ids) | (chosen_mask != rejected_mask))
    end = either.sum(dim=1)
    start = torch.where(differs.any(dim=1), differs.int().argmax(dim=1), end - 1)
    span = (columns >= start.unsqueeze(1)) & either

    chosen = _hold_last_value(chosen_values, chosen_mask)
    rejected = _hold_last_value(rejected_values, rejected_mask)
    losses = pairwise_loss(chosen, rejected, 0.0 if margin is None else margin.unsqueeze(1))
    return masked_sum(losses, span, dim=1) / span.sum(dim=1)


def _swap_halves(rows: Tensor) -> Tensor:
    """B rows and their B partners, in the other order. (2B, T) -> (2B, T)."""
    return torch.cat(rows.chunk(2)[::-1])


def _hold_last_value(values: Tensor, mask: Tensor) -> Tensor:
    """Replace the values behind the end of each right-padded row by the value of its last token. (B, T) -> (B, T)."""
    columns = torch.arange(values.size(1), device=values.device)
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return values.gather(1, torch.minimum(columns.expand_as(values), last))
