"""Losses of direct preference optimisation against numbers worked out by hand and independent formulas."""

import math

import pytest
import torch

from utils.algorithms import preference_losses as losses
from utils.algorithms.preference_losses import Labelled, Pairs, Settings, Step
from utils.arguments.choices import PREFERENCE_LOSSES


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def pairs_of(*rows: tuple[float, ...], margin=0.0, step=None, dtype=torch.float64) -> Pairs:
    """Rows of c, r, c', r'; means are a tenth of the sums."""
    columns = torch.tensor(rows, dtype=dtype).T
    chosen, rejected, reference_chosen, reference_rejected = columns
    whole = step or Step(
        chosen=chosen.detach(), rejected=rejected.detach(),
        reference_chosen=reference_chosen, reference_rejected=reference_rejected, shift=0.3,
    )  # fmt: skip
    return Pairs(
        chosen=chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected,
        chosen_mean=chosen / 10, rejected_mean=rejected / 10, margin=torch.full_like(chosen, margin),
        places=torch.arange(len(chosen)), step=whole,
    )  # fmt: skip


ROWS = [(-12.0, -15.0, -13.0, -14.5), (-20.0, -9.0, -18.0, -11.0), (-7.5, -7.0, -9.0, -8.0)]


def test_losses_worked_out_by_hand():
    """c - c' = 1, r - r' = -0.5, h = 1.5 with beta 0.5: b h = 0.75."""
    pair, settings = pairs_of(ROWS[0]), Settings(beta=0.5, label_smoothing=0.1, simpo_gamma=0.2)
    plain = Settings(beta=0.5)
    expected = {
        "sigmoid": (plain, 0.386871),  # ln(1 + e^-0.75)
        "ipo": (plain, 0.25),  # (1.5 - 1)^2
        "hinge": (plain, 0.25),  # 1 - 0.75
        "apo_zero": (plain, (1 - 0.622459) + 0.437823),
        "apo_down": (plain, 0.622459 + (1 - 0.679179)),
        "sppo_hard": (plain, 0.0 + 0.25),  # (1 - 1)^2 + (-0.5 + 1)^2
        "nca_pair": (plain, 0.474077 + 0.5 * 0.974077 + 0.5 * 0.575939),
        "bco_pair": (plain, 0.598139 + 0.455492),  # shift 0.3: -log s(0.2), -log s(0.3 + 0.25)
        "sft": (plain, 1.2),
        "cpo": (plain, 0.201413 + 1.2),  # -log s(0.5 * 3)
        "simpo": (settings, 0.9 * 0.718460 + 0.1 * 0.668460),  # b (C - R) - gamma = 0.15 - 0.2
    }
    for name, (chosen, value) in expected.items():
        found = PREFERENCE_LOSSES[name].load()(pair, chosen)
        torch.testing.assert_close(found, torch.tensor([value], dtype=torch.float64), atol=2e-6, rtol=0, msg=name)


def independent(name: str, row, beta, smoothing, gamma, tau, rows, shift) -> float:
    """Each loss from its paper, in plain Python."""
    c, r, cc, rr = row
    mean_c, mean_r = c / 10, r / 10
    h = (c - r) - (cc - rr)
    odds = math.log(math.exp(mean_c) / (1 - math.exp(mean_c))) - math.log(math.exp(mean_r) / (1 - math.exp(mean_r)))
    q = sigmoid(beta * h)
    kl_c = max(0.0, sum(a - x for a, _, x, _ in rows) / len(rows))
    kl_r = max(0.0, sum(b - y for _, b, _, y in rows) / len(rows))
    place = sum(a - b < c - r for a, b, _, _ in rows)
    sorted_reference = sorted(x - y for _, _, x, y in rows)
    ot = (c - r) - sorted_reference[place]
    m = sigmoid(beta * h / tau)
    return {
        "sigmoid": -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h),
        "robust": (-(1 - smoothing) * log_sigmoid(beta * h) + smoothing * log_sigmoid(-beta * h)) / (1 - 2 * smoothing),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * h),
        "kto_pair": (1 - sigmoid(beta * (c - cc - kl_r))) + (1 - sigmoid(beta * (kl_c - (r - rr)))),
        "apo_zero": 1 - sigmoid(beta * (c - cc)) + sigmoid(beta * (r - rr)),
        "apo_down": sigmoid(beta * (c - cc)) + 1 - sigmoid(beta * (c - cc) - beta * (r - rr)),
        "bco_pair": -log_sigmoid(beta * (c - cc) - shift) - log_sigmoid(-(beta * (r - rr) - shift)),
        "nca_pair": -log_sigmoid(beta * (c - cc)) - sum(log_sigmoid(-beta * ratio) for ratio in (c - cc, r - rr)) / 2,
        "sppo_hard": (c - cc - 1 / (2 * beta)) ** 2 + (r - rr + 1 / (2 * beta)) ** 2,
        "exo_pair": q * math.log(q / (1 - smoothing)) + (1 - q) * math.log((1 - q) / smoothing),
        "aot": -(1 - smoothing) * log_sigmoid(beta * ot) - smoothing * log_sigmoid(-beta * ot),
        "discopop": -(1 - m) * log_sigmoid(beta * h) + m * math.exp(-beta * h),
        "orpo": -mean_c - beta * log_sigmoid(odds),
        "simpo": -(1 - smoothing) * log_sigmoid(beta * (mean_c - mean_r) - gamma)
        - smoothing * log_sigmoid(-(beta * (mean_c - mean_r) - gamma)),
        "cpo": -(1 - smoothing) * log_sigmoid(beta * (c - r)) - smoothing * log_sigmoid(-beta * (c - r)) - mean_c,
        "sft": -mean_c,
    }[name]


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if name not in ("kto", "aot_unpaired")])
def test_each_loss_equals_its_formula_and_has_its_slope(name):
    generator = torch.Generator().manual_seed(3)
    rows = (-torch.rand(6, 4, generator=generator, dtype=torch.float64) * 20 - 1).tolist()
    numbers = {"beta": 0.3, "label_smoothing": 0.15, "simpo_gamma": 0.7, "discopop_tau": 0.05}
    loss = PREFERENCE_LOSSES[name].load()
    found = loss(pairs_of(*rows), Settings(**numbers))
    expected = [independent(name, row, 0.3, 0.15, 0.7, 0.05, rows, 0.3) for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)

    given = torch.tensor(rows, dtype=torch.float64, requires_grad=True)  # the step's numbers stay as they are
    pairs = pairs_of(*rows)
    moved = Pairs(
        **(vars(pairs) | {"chosen": given[:, 0], "rejected": given[:, 1]})
        | {"chosen_mean": given[:, 0] / 10, "rejected_mean": given[:, 1] / 10}
    )
    loss(moved, Settings(**numbers)).sum().backward()
    for row, column in ((0, 0), (3, 1)):
        slopes = []
        for change in (1e-6, -1e-6):
            nudged = [list(numbers_of_row) for numbers_of_row in rows]
            nudged[row][column] += change
            step_rows = rows if name == "kto_pair" else nudged  # KTO's means carry no gradient
            slopes.append(independent(name, nudged[row], 0.3, 0.15, 0.7, 0.05, step_rows, 0.3))
        assert given.grad[row, column].item() == pytest.approx((slopes[0] - slopes[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_aot_of_unpaired_answers_sorts_each_kind_and_its_gradient_is_that_of_the_whole_step():
    """Computed in two micro-batches, value and gradient equal the loss of the whole step in one piece."""
    generator = torch.Generator().manual_seed(5)
    rows = (-torch.rand(8, 4, generator=generator, dtype=torch.float64) * 20).tolist()
    settings = Settings(beta=0.3)
    whole = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    chosen, rejected = whole[:, 0] - whole[:, 2].detach(), whole[:, 1] - whole[:, 3].detach()
    expected = torch.nn.functional.softplus(-0.3 * (chosen.sort().values - rejected.sort().values)).sum()
    expected.backward()

    given = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    pairs, total = pairs_of(*rows), 0.0
    for part in (slice(0, 3), slice(3, 8)):
        columns = {"chosen": given[part, 0], "rejected": given[part, 1], "places": torch.arange(8)[part]}
        columns |= {"reference_chosen": given[part, 2].detach(), "reference_rejected": given[part, 3].detach()}
        columns |= {name: getattr(pairs, name)[part] for name in ("chosen_mean", "rejected_mean", "margin")}
        loss = losses.aot_unpaired_loss(Pairs(**columns, step=pairs.step), settings).sum()
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item())
    torch.testing.assert_close(given.grad[:, :2], whole.grad[:, :2])


def test_kto_worked_out_by_hand():
    """a - a' = 1 and -2, KL 0.4, beta 0.5, weights 2 and 3."""
    answers = Labelled(
        answer=torch.tensor([-9.0, -12.0]), reference=torch.tensor([-10.0, -10.0]), mean=torch.zeros(2),
        label=torch.tensor([True, False]), step=Step(kl=torch.tensor(0.4)),
    )  # fmt: skip
    settings = Settings(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    wanted = 2 * (1 - sigmoid(0.5 * (1 - 0.4))), 3 * (1 - sigmoid(0.5 * (0.4 + 2)))
    torch.testing.assert_close(losses.kto_loss(answers, settings), torch.tensor(wanted))


def test_dpo_loss_of_an_unchanged_policy_is_ln_2_and_pulls_the_two_answers_apart_alike():
    chosen, rejected = (torch.tensor([-5.0], requires_grad=True) for _ in range(2))
    pairs = Pairs(
        chosen=chosen, rejected=rejected, reference_chosen=chosen.detach(), reference_rejected=rejected.detach(),
        chosen_mean=chosen, rejected_mean=rejected, margin=torch.zeros(1),
    )  # fmt: skip
    loss = losses.sigmoid_loss(pairs, Settings(beta=0.2))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.item() == pytest.approx(-0.1) and rejected.grad.item() == pytest.approx(0.1)


def test_a_margin_lowers_the_reward_of_the_pair():
    with_margin = losses.sigmoid_loss(pairs_of(ROWS[0], margin=0.25), Settings(beta=0.5))
    assert with_margin.item() == pytest.approx(-log_sigmoid(0.75 - 0.25))
    assert losses.simpo_loss(pairs_of(ROWS[0], margin=0.25), Settings(beta=2.0, simpo_gamma=0.1)).item() == (
        pytest.approx(-log_sigmoid(2.0 * 0.3 - 0.1 - 0.25))
    )


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if name != "kto"])
def test_no_loss_or_slope_is_nan_far_away_from_the_reference(name):
    rows = [(-1.0, -400.0, -200.0, -1.0), (-400.0, -1e-9, -1.0, -300.0)]
    given = torch.tensor(rows, requires_grad=True)
    pairs = pairs_of(*rows, dtype=torch.float32)
    columns = {"chosen": given[:, 0], "rejected": given[:, 1], "chosen_mean": given[:, 0], "rejected_mean": given[:, 1]}
    loss = PREFERENCE_LOSSES[name].load()(Pairs(**(vars(pairs) | columns)), Settings(beta=0.1, label_smoothing=0.1))
    loss.sum().backward()
    assert loss.isfinite().all() and given.grad.isfinite().all()
