"""Log-probabilities of judged answers, two to a row, and how they become the quantities that losses are made of.

row of pairs       a prompt, the chosen and the rejected answer
labelled row       a prompt, its answer, and a mate: the answer to another prompt, for KTO's estimate of the KL

B rows, 2 answers, and 2 parts of an answer: the tokens up to the length of the shorter answer of the pair, and those
beyond it, which `--ld_alpha` weighs less. All of a mate and of the answer before it count as the first part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.algorithms.preference_losses import Labelled, Pairs, Step
from utils.data.batches.collate import Batch
from utils.parallel import distributed
from utils.parallel.zero import Engine


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is known of B rows.

    Attributes:
        policy, reference: (B, 2, 2) fp32, sums of the log-probabilities of a part's tokens; zeros without a reference.
        tokens: (B, 2, 2) how many tokens a part has.
        margin: (B,), of pairs. label: (B,) bool; true for pairs.
        weight: (B,) in the loss. counts: (B,) bool, false for a row that only fills up a batch.
        places: (B,) their numbers among the rows of the optimiser step on all ranks; None outside of one.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    margin: Tensor
    label: Tensor
    weight: Tensor
    counts: Tensor
    places: Tensor | None = None

    def detached(self) -> "Answers":
        """The same numbers without their history."""
        return replace(self, policy=self.policy.detach())


def read_answers(engine: Engine, batch: Batch, *, which: slice = slice(0, 2)) -> Answers:
    """The answers of a batch (`collate_preference`, `collate_labelled`) by the model in `engine`.

    Args:
        which: of the two answers of a row; the numbers of the others are zeros.
    """
    rows = len(batch["row_mask"])
    mask = batch["response_mask"].clone()
    mask[:, 0] = False  # the first token of a row has no predecessor
    part = slice(which.start * rows, which.stop * rows)
    both = which == slice(0, 2)
    logprobs, _ = engine(
        batch["input_ids"][part],
        batch["attention_mask"][part],
        mask[part],
        prompt_lengths=batch["prompt_lengths"] if both else None,
    )
    lengths = mask.sum(1).unflatten(0, (2, rows))
    common = lengths.amin(0) if "labels" not in batch else lengths
    first, beyond = _sums(logprobs, mask[part], common.expand(2, rows)[which].flatten())
    policy = torch.stack([first, beyond], 1).unflatten(0, (-1, rows)).transpose(0, 1)
    policy = torch.nn.functional.pad(policy, (0, 0, which.start, 2 - which.stop))
    reference = batch.get("reference_logprobs")
    return Answers(
        policy=policy,
        reference=torch.zeros_like(policy) if reference is None else reference,
        tokens=torch.stack([common.expand(2, rows), lengths - common], 2).transpose(0, 1),
        margin=batch["margin"] if "margin" in batch else policy.new_zeros(rows),
        label=batch["labels"] if "labels" in batch else torch.ones_like(batch["row_mask"]),
        weight=batch["weight"],
        counts=batch["row_mask"],
        places=batch.get("places"),
    )


def _sums(logprobs: Tensor, mask: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first `common` (S,) targets of each row of `mask` (S, T), and over the others, (S,) each."""
    spread = torch.zeros(mask.shape, dtype=logprobs.dtype, device=logprobs.device).masked_scatter(mask, logprobs)
    is_first = mask.cumsum(1) <= common[:, None]
    return torch.where(is_first, spread, 0).sum(1), torch.where(is_first, 0, spread).sum(1)


def all_ranks(parts: Sequence[Answers]) -> Answers:
    """The rows of `parts` on all ranks, which have equally many, without fillers and without gradients."""
    columns = [
        torch.cat([getattr(part, name).detach().float().reshape(len(part.counts), -1) for part in parts])
        for name in ("policy", "reference", "tokens", "margin", "label", "weight", "counts")
    ]
    table = distributed.gather_rows(torch.cat(columns, 1))
    table = table[table[:, -1] > 0]
    policy, reference, tokens, margin, label, weight, counts = table.split([4, 4, 4, 1, 1, 1, 1], 1)
    return Answers(
        policy=policy.reshape(-1, 2, 2),
        reference=reference.reshape(-1, 2, 2),
        tokens=tokens.reshape(-1, 2, 2),
        margin=margin[:, 0],
        label=label[:, 0] > 0,
        weight=weight[:, 0],
        counts=counts[:, 0] > 0,
        places=torch.arange(len(table), device=table.device),
    )


@dataclass(frozen=True)
class Reading:
    """How log-probabilities of parts become one number for an answer: the flags of these names."""

    length_normalize: bool = False
    ld_alpha: float = 1.0

    def score(self, sums: Tensor, tokens: Tensor) -> Tensor:
        """(B, 2, 2) -> (B, 2): the sum, its tail weighted by `ld_alpha` (Liu et al. 2024, eq. 11), maybe per token."""
        weighted = sums[..., 0] + self.ld_alpha * sums[..., 1]
        return weighted / tokens.sum(-1).clamp(min=1) if self.length_normalize else weighted

    def pairs(self, answers: Answers, step: Step) -> Pairs:
        """The quantities of B pairs."""
        policy, reference = (self.score(sums, answers.tokens) for sums in (answers.policy, answers.reference))
        means = answers.policy.sum(-1) / answers.tokens.sum(-1).clamp(min=1)
        return Pairs(
            chosen=policy[:, 0],
            rejected=policy[:, 1],
            reference_chosen=reference[:, 0],
            reference_rejected=reference[:, 1],
            chosen_mean=means[:, 0],
            rejected_mean=means[:, 1],
            margin=answers.margin,
            places=answers.places,
            step=step,
        )

    def labelled(self, answers: Answers, step: Step) -> Labelled:
        """The quantities of B answers that were judged alone."""
        policy, reference = (self.score(sums, answers.tokens) for sums in (answers.policy, answers.reference))
        means = answers.policy.sum(-1) / answers.tokens.sum(-1).clamp(min=1)
        return Labelled(
            answer=policy[:, 0], reference=reference[:, 0], mean=means[:, 0], label=answers.label, step=step
        )
