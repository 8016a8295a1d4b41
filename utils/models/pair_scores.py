"""How well a reward model separates the chosen from the rejected response of held-out pairs."""

import torch

from utils.algorithms.advantages import masked_moments, moments_to_mean_var
from utils.parallel import distributed
from utils.parallel.divergence import check_finite


class PairScores:
    """Sums over batches of pairs, then over ranks."""

    def __init__(self) -> None:
        self._sums = {"pairs": 0, "loss": 0.0, "correct": 0.0, "margin": 0.0}
        self._moments = torch.zeros(2, 3, dtype=torch.float64)

    def add(self, losses: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Add a batch: losses and scores of its pairs, each (B,)."""
        all_pairs = torch.ones_like(chosen, dtype=torch.bool)
        self._moments += torch.stack([masked_moments(scores, all_pairs) for scores in (chosen, rejected)]).cpu()
        self._sums["pairs"] += len(losses)
        self._sums["loss"] += losses.sum().item()
        self._sums["correct"] += (chosen > rejected).sum().item()
        self._sums["margin"] += (chosen - rejected).sum().item()

    def metrics(self) -> dict[str, float]:
        """Loss, accuracy, margin, mean and standard deviation of the scores over the pairs of all ranks, as "eval/...".

        Raises:
            DivergenceError: the loss is NaN or infinite.
        """
        sums, moments = distributed.all_reduce_dict(self._sums), distributed.all_reduce(self._moments)
        check_finite(sums["loss"], "held-out pairs")
        (chosen_mean, chosen_var), (rejected_mean, rejected_var) = (moments_to_mean_var(row) for row in moments)
        return {
            "eval/loss": sums["loss"] / sums["pairs"],
            "eval/accuracy": sums["correct"] / sums["pairs"],
            "eval/margin": sums["margin"] / sums["pairs"],
            "eval/chosen_mean": chosen_mean.item(),
            "eval/chosen_std": chosen_var.sqrt().item(),
            "eval/rejected_mean": rejected_mean.item(),
            "eval/rejected_std": rejected_var.sqrt().item(),
        }
