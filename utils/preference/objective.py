"""What direct preference optimisation minimises, and the figures that say how far it has come."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.algorithms.preference_losses import Settings, Step
from utils.arguments.choices import PREFERENCE_LOSSES
from utils.arguments.steps import DpoConfig
from utils.data.batches.collate import Batch
from utils.parallel import distributed
from utils.parallel.divergence import check_finite
from utils.parallel.zero import Engine
from utils.preference.answers import Answers, Reading, all_ranks, read_answers

ANSWER, MATE = slice(0, 1), slice(1, 2)


class Objective:
    """The sum of the losses of `--loss`, with the options of `PreferenceArguments`.

    Attributes:
        shift: [mean, steps] of BCO's running mean of rewards; belongs to a checkpoint.
    """

    def __init__(self, config: DpoConfig) -> None:
        rows = {name: PREFERENCE_LOSSES[name] for name in config.loss_weights}
        self._terms = [(config.loss_weights[name], row.load()) for name, row in rows.items()]
        self._looks_at_step = any(row.looks_at_step for row in rows.values())
        self._per_token = all(row.per_token for row in rows.values())
        self._labelled, self._rpo_alpha = config.reads_labelled, config.rpo_alpha
        self._reading = Reading(config.length_normalize, config.ld_alpha)
        self._settings = Settings(**{name: getattr(config, name) for name in Settings.__dataclass_fields__})
        self.shift = [0.0, 0]

    def look_ahead(self, engine: Engine, batches: Sequence[Batch]) -> Step:
        """What the losses need to know of a whole optimiser step, from a forward pass over all of its micro-batches.

        Nothing is computed where no loss looks at the step. Every rank must call it with its micro-batches, which then
        know the places of their rows. BCO's mean moves on by this step.
        """
        if not self._looks_at_step:
            return Step()
        engine.eval()
        with torch.no_grad():
            which = MATE if self._labelled else slice(0, 2)
            parts = [read_answers(engine, batch, which=which) for batch in batches]
        engine.train()
        whole = all_ranks(parts)
        self._place(batches)
        step = self.step_of(whole)
        if not self._labelled:
            mean = self._settings.beta * torch.cat([whole_ratio(step, "chosen"), whole_ratio(step, "rejected")]).mean()
            count = self.shift[1] + 1
            self.shift[:] = [self.shift[0] + (mean.item() - self.shift[0]) / count, count]
        return self.step_of(whole)

    def _place(self, batches: Sequence[Batch]) -> None:
        """Give each row of this rank its number among those that `all_ranks` keeps."""
        own = torch.cat([batch["row_mask"] for batch in batches])
        numbers = distributed.gather_rows(own.long()[:, None])[:, 0].cumsum(0) - 1
        start = distributed.rank() * len(own)
        parts = numbers[start : start + len(own)].split([len(batch["row_mask"]) for batch in batches])
        for batch, places in zip(batches, parts, strict=True):
            batch["places"] = places.clamp(min=0)

    def step_of(self, whole: Answers) -> Step:
        """`whole` are the rows of all ranks."""
        if self._labelled:
            mates = self._reading.score(whole.policy, whole.tokens)[:, 1]
            references = self._reading.score(whole.reference, whole.tokens)[:, 1]
            return Step(kl=(mates - references).mean().clamp(min=0))
        pairs = self._reading.pairs(whole, Step())
        return Step(
            chosen=pairs.chosen,
            rejected=pairs.rejected,
            reference_chosen=pairs.reference_chosen,
            reference_rejected=pairs.reference_rejected,
            shift=self.shift[0],
        )

    def read(self, engine: Engine, batch: Batch) -> Answers:
        """The answers of a batch, with gradients."""
        return read_answers(engine, batch, which=ANSWER if self._labelled else slice(0, 2))

    def losses(self, answers: Answers, step: Step) -> Tensor:
        """(B,) fp32, each times the weight of its row; 0 for fillers."""
        if self._labelled:
            quantities = self._reading.labelled(answers, step)
        else:
            quantities = self._reading.pairs(answers, step)
        losses = sum(weight * loss(quantities, self._settings) for weight, loss in self._terms)
        if self._rpo_alpha:
            losses = losses - self._rpo_alpha * quantities.chosen_mean
        return torch.where(answers.counts, losses * answers.weight, 0)

    def figures(self, parts: Sequence[Answers], step: Step | None = None, *, prefix: str) -> dict[str, float]:
        """Means over the rows of all ranks, under names that begin with `prefix`.

        Args:
            step: of the training step that the rows belong to; without one the rows themselves are the step.

        Raises:
            DivergenceError: the loss of held-out rows is NaN or infinite; that of training rows is the guard's concern.
        """
        whole = all_ranks(parts)
        is_held_out, step = step is None, step or self.step_of(whole)
        loss = (self.losses(whole, step).sum() / whole.weight.sum()).item()
        if is_held_out:
            check_finite(loss, "held-out rows")
        sums, tokens = whole.policy.sum(-1), whole.tokens.sum(-1)
        rewards = self._rewards(whole)
        figures = {"loss": loss}
        if self._labelled:
            centred = rewards[:, 0] - self._settings.beta * step.kl
            figures |= {"accuracy": ((centred > 0) == whole.label).float().mean(), "kl": step.kl}
            for name, rows in (("chosen", whole.label), ("rejected", ~whole.label)):
                figures |= _of_answers(name, rewards[:, 0][rows], sums[:, 0][rows], tokens[:, 0][rows])
        else:
            figures["accuracy"] = (rewards[:, 0] > rewards[:, 1]).float().mean()
            for index, name in enumerate(("chosen", "rejected")):
                figures |= _of_answers(name, rewards[:, index], sums[:, index], tokens[:, index])
        if "chosen_reward" in figures and "rejected_reward" in figures:
            figures["margin"] = figures["chosen_reward"] - figures["rejected_reward"]
        return {f"{prefix}/{name}": float(value) for name, value in figures.items()}

    def _rewards(self, whole: Answers) -> Tensor:
        """(B, 2) implicit rewards: beta times how much likelier an answer is than under the reference."""
        reading = Reading(self._reading.length_normalize or self._per_token, self._reading.ld_alpha)
        policy, reference = (reading.score(sums, whole.tokens) for sums in (whole.policy, whole.reference))
        return self._settings.beta * (policy - reference)


def whole_ratio(step: Step, name: str) -> Tensor:
    """(M,) log-probabilities under the policy minus those under the reference."""
    return getattr(step, name) - getattr(step, f"reference_{name}")


def _of_answers(name: str, rewards: Tensor, sums: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Means over answers of one kind; nothing where there are none."""
    if not len(rewards):
        return {}
    return {
        f"{name}_reward": rewards.mean(),
        f"{name}_logprob": sums.mean(),
        f"{name}_tokens": tokens.float().mean(),
    }
