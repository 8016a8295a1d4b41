"""Figures of held-out pairs against numbers worked out by hand."""

import math

import pytest
import torch

from utils.models.pair_scores import PairScores, calibration_bins, calibration_error
from utils.parallel.divergence import DivergenceError


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def batch_of(chosen: list[int], rejected: list[int], sources: list[int], row_mask: list[bool] | None = None) -> dict:
    """A batch of pairs with responses of so many tokens."""
    lengths = torch.tensor(chosen + rejected)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    counts = torch.tensor(row_mask or [True] * len(chosen))
    numbers = {"source": torch.tensor(sources), "weight": counts.float()}
    return {"response_mask": mask, "row_mask": counts, **numbers}


def test_calibration_error_by_hand():
    """Three pairs at confidence 0.62, two of them right; one right and one wrong at 0.93."""
    difference = torch.tensor([logit(0.62), logit(0.62), logit(0.38), logit(0.93), logit(0.07)])
    bins = calibration_bins(difference)
    assert bins[:, 0].tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 2, 0]  # [0.6, 0.65) and [0.9, 0.95)
    expected = (3 * abs(2 / 3 - 0.62) + 2 * abs(1 / 2 - 0.93)) / 5
    assert calibration_error(bins) == pytest.approx(expected, abs=1e-6)
    halves = calibration_bins(difference[:2]) + calibration_bins(difference[2:])
    assert calibration_error(halves) == pytest.approx(expected, abs=1e-6)  # not a mean over batches


def test_calibration_at_the_ends_of_the_range():
    certain = torch.tensor([1e4, 200.0])
    assert calibration_error(calibration_bins(certain)) == 0.0
    assert calibration_error(calibration_bins(-certain)) == 1.0
    assert calibration_error(calibration_bins(torch.zeros(4))) == 0.0  # equal scores: half of the pairs are right


def test_a_model_that_draws_labels_from_its_own_probabilities_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    difference = 2 * torch.randn(200_000, generator=generator)
    swapped = torch.rand(len(difference), generator=generator) > difference.sigmoid()
    labelled = torch.where(swapped, -difference, difference)
    assert calibration_error(calibration_bins(labelled)) < 0.01
    assert calibration_error(calibration_bins(3 * labelled)) > 0.1  # three times as sure, no better


def test_accuracy_by_length_and_by_data_set():
    scores = PairScores(["a", "b", "unseen", "a"])
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    scores.add(torch.ones(3), chosen, rejected, batch_of([1, 2, 5], [3, 4, 4], [0, 0, 1]))
    scores.add(torch.ones(1), torch.tensor([0.0]), torch.tensor([3.0]), batch_of([4, 9], [4, 1], [3, 1], [True, False]))
    metrics = scores.metrics()
    found = {name: value for name, value in metrics.items() if name.startswith("eval/accuracy")}
    assert found == {
        "eval/accuracy": 2 / 4,
        "eval/accuracy_chosen_shorter": 1 / 2,
        "eval/accuracy_chosen_longer": 1.0,
        "eval/accuracy/a": 1 / 3,
        "eval/accuracy/b": 1.0,
    }
    assert all(math.isfinite(value) for value in metrics.values())


def test_numbers_over_no_pairs_are_left_out():
    scores = PairScores(["only"])
    scores.add(torch.ones(1), torch.tensor([1.0]), torch.tensor([0.0]), batch_of([3], [3], [0]))
    assert [name for name in scores.metrics() if "accuracy" in name] == ["eval/accuracy"]


def test_nan_scores_end_in_the_error_that_names_them():
    scores = PairScores()
    nan = torch.tensor([math.nan])
    scores.add(nan, nan, nan, batch_of([3], [2], [0]))
    with pytest.raises(DivergenceError):
        scores.metrics()
