"""How well a reward model separates the chosen from the rejected response of held-out pairs."""

from collections.abc import Mapping, Sequence

import torch

from utils.algorithms.advantages import masked_moments, moments_to_mean_var
from utils.parallel import distributed
from utils.parallel.divergence import check_finite

CALIBRATION_BINS = 10
CHOSEN_SHORTER, CHOSEN_LONGER = "eval/accuracy_chosen_shorter", "eval/accuracy_chosen_longer"


def source_accuracies(sources: Sequence[str]) -> list[str]:
    """The metric of each of several data sets, by their names; none for one. Equal names share a metric."""
    return [f"eval/accuracy/{name}" for name in sources] if len(set(sources)) > 1 else []


def calibration_bins(difference: torch.Tensor) -> torch.Tensor:
    """Number of pairs, sum of confidences and sum of right decisions in each bin, (CALIBRATION_BINS, 3) fp64.

    The model prefers one response with confidence max(p, 1 - p), p = sigmoid(difference), which lies between 1/2 and 1;
    the bins divide this range evenly. A pair with equal scores counts as half right.

    Args:
        difference: (B,) chosen minus rejected score.
    """
    confidence = difference.abs().double().sigmoid()
    right = (difference > 0).double() + (difference == 0).double() / 2
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    rows = torch.stack([torch.ones_like(right), confidence, right], dim=1)
    return rows.new_zeros(CALIBRATION_BINS, 3).index_add(0, bins, rows)


def calibration_error(bins: torch.Tensor) -> float:
    """The expected calibration error: |accuracy - mean confidence| of each bin, weighted by its pairs.

    Guo et al. 2017, "On calibration of modern neural networks", equation 3, of `calibration_bins` summed over batches.
    """
    pairs, confidence, right = bins.unbind(dim=1)
    return ((right - confidence).abs().sum() / pairs.sum()).item()


class PairScores:
    """Sums over batches of pairs, then over ranks.

    Args:
        sources: names of the data sets that the pairs come from, for accuracies of each; a name may occur twice.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sums = {"pairs": 0, "weight": 0.0, "loss": 0.0, "correct": 0.0, "margin": 0.0}
        self._by_source = source_accuracies(sources)
        self._groups = dict.fromkeys([CHOSEN_SHORTER, CHOSEN_LONGER, *self._by_source])
        self._sums |= {f"{what} of {group}": 0 for group in self._groups for what in ("pairs", "correct")}
        self._moments = torch.zeros(2, 3, dtype=torch.float64)
        self._bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64)

    def add(
        self, losses: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, batch: Mapping[str, torch.Tensor]
    ) -> None:
        """Add a batch.

        Args:
            losses, chosen, rejected: losses times their weights, and scores, of its B pairs, (B,) each, without pairs
                that only fill it up.
            batch: from `collate_preference`, with these.
        """
        correct = chosen > rejected
        all_pairs = torch.ones_like(correct)
        self._moments += torch.stack([masked_moments(scores, all_pairs) for scores in (chosen, rejected)]).cpu()
        self._bins += calibration_bins(chosen - rejected).cpu()
        self._sums["pairs"] += len(losses)
        self._sums["weight"] += batch["weight"].sum().item()
        self._sums["loss"] += losses.sum().item()
        self._sums["correct"] += correct.sum().item()
        self._sums["margin"] += (chosen - rejected).sum().item()
        counts = batch["row_mask"]
        chosen_length, rejected_length = (side[counts] for side in batch["response_mask"].sum(dim=1).chunk(2))
        self._add_group(CHOSEN_SHORTER, chosen_length < rejected_length, correct)
        self._add_group(CHOSEN_LONGER, chosen_length > rejected_length, correct)
        for number, metric in enumerate(self._by_source):
            self._add_group(metric, batch["source"][counts] == number, correct)

    def _add_group(self, group: str, members: torch.Tensor, correct: torch.Tensor) -> None:
        self._sums[f"pairs of {group}"] += members.sum().item()
        self._sums[f"correct of {group}"] += (members & correct).sum().item()

    def metrics(self) -> dict[str, float]:
        """Numbers over the pairs of all ranks, as "eval/...".

        Loss, accuracy, margin, mean and standard deviation of the scores, and `calibration_error`; accuracy where the
        chosen response has fewer tokens than the rejected one, where it has more, and for each of several data sets. An
        accuracy over no pairs is left out.

        Raises:
            DivergenceError: the loss is NaN or infinite.
        """
        sums, moments = distributed.all_reduce_dict(self._sums), distributed.all_reduce(self._moments)
        check_finite(sums["loss"], "held-out pairs")
        (chosen_mean, chosen_var), (rejected_mean, rejected_var) = (moments_to_mean_var(row) for row in moments)
        metrics = {
            "eval/loss": sums["loss"] / sums["weight"],
            "eval/accuracy": sums["correct"] / sums["pairs"],
            "eval/margin": sums["margin"] / sums["pairs"],
            "eval/chosen_mean": chosen_mean.item(),
            "eval/chosen_std": chosen_var.sqrt().item(),
            "eval/rejected_mean": rejected_mean.item(),
            "eval/rejected_std": rejected_var.sqrt().item(),
            "eval/calibration_error": calibration_error(distributed.all_reduce(self._bins)),
        }
        for group in self._groups:
            if pairs := sums[f"pairs of {group}"]:
                metrics[group] = sums[f"correct of {group}"] / pairs
        return metrics
