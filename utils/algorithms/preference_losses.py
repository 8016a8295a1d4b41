"""Losses of direct preference optimisation: each says, for every pair of answers, how far the policy is from the goal.

    c, r      log-probability of the chosen and of the rejected answer under the policy; c', r' under the reference
    h         (c - c') - (r - r'), how much more than the reference the policy prefers the chosen answer
    |c|, |r|  tokens of the answers                 b       beta, the strength of the tie to the reference

A loss is a function of `Pairs` and `Settings` that returns (B,) fp32, one number for each pair, and a row of
`PREFERENCE_LOSSES` in `utils.arguments.choices`. `kto_loss` is one of `Labelled` answers, which come without a partner.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_MEAN_LOGPROB = -1e-6  # of a token, in ORPO's log(1 - p), which is -inf at p = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers that a loss may depend on; the flags of the same names explain them."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a loss needs to know of a whole optimiser step on all ranks. Nothing here has a gradient.

    Attributes:
        chosen, rejected: (M,) c and r of all M pairs; reference_chosen, reference_rejected: (M,) c' and r'.
        kl: KTO's estimate of the KL to the reference, at least 0.
        shift: BCO's running mean of the rewards.
    """

    chosen: Tensor | None = None
    rejected: Tensor | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    kl: Tensor | float = 0.0
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log-probabilities of B pairs of answers, fp32. What "log-probability" of an answer is depends on the options.

    Attributes:
        chosen, rejected, reference_chosen, reference_rejected: (B,) c, r, c', r'; zeros without a reference.
        chosen_mean, rejected_mean: (B,) mean over the tokens of the answer under the policy.
        margin: (B,) by how much the reward of the chosen answer should exceed that of the rejected one.
        places: (B,) indices of these pairs among those of `step`; None where no loss looks at the step.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    margin: Tensor
    places: Tensor | None = None
    step: Step = Step()

    @property
    def chosen_ratio(self) -> Tensor:
        """c - c'."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """r - r'."""
        return self.rejected - self.reference_rejected

    @property
    def difference(self) -> Tensor:
        """h."""
        return self.chosen_ratio - self.rejected_ratio


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Log-probabilities of B answers that were judged alone, fp32.

    Attributes:
        answer, reference: (B,) under the policy and under the reference. mean: (B,) per token under the policy.
        label: (B,) bool, true for a desirable answer.
    """

    answer: Tensor
    reference: Tensor
    mean: Tensor
    label: Tensor
    step: Step = Step()


def sigmoid_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(b h).

    With label smoothing e, conservative DPO (Mitchell 2023): the labels are taken to be wrong with probability e. With
    a margin m, DPO with an offset (Amini et al. 2024, eq. 5): -log sigmoid(b h - m).
    """
    return _smoothed(_scaled(pairs, settings), settings.label_smoothing)


def robust_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, eq. 12): an unbiased estimate of DPO's loss where labels are flipped with
    probability e: (-(1 - e) log sigmoid(b h) + e log sigmoid(-b h)) / (1 - 2 e)."""
    scaled, flipped = _scaled(pairs, settings), settings.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(scaled) + flipped * F.logsigmoid(-scaled)) / (1 - 2 * flipped)


def ipo_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): (h - 1 / (2 b))^2, with log-probabilities of whole answers, as in the paper.

    TRL takes means over tokens here instead, which `--length_normalize` gives.
    """
    return (pairs.difference - 1 / (2 * settings.beta)).square()


def hinge_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """SLiC's hinge on DPO's reward (Zhao et al. 2023, eq. 1; Liu et al. 2024, RSO, eq. 9): max(0, 1 - b h)."""
    return torch.relu(1 - _scaled(pairs, settings))


def kto_pair_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """KTO's first published form for pairs (Ethayarajh et al. 2023, report on HALOs).

    1 - sigmoid(b (c - c' - R)) + 1 - sigmoid(b (C - (r - r'))), where C and R are the means of c - c' and of r - r'
    over the step, but at least 0: chosen answers are compared with the rejected ones, and the other way round. They
    carry no gradient, as in the paper, unlike in old versions of TRL.
    """
    step = pairs.step
    chosen_kl = (step.chosen - step.reference_chosen).mean().clamp(min=0)
    rejected_kl = (step.rejected - step.reference_rejected).mean().clamp(min=0)
    wanted = torch.sigmoid(settings.beta * (pairs.chosen_ratio - rejected_kl))
    unwanted = torch.sigmoid(settings.beta * (chosen_kl - pairs.rejected_ratio))
    return (1 - wanted) + (1 - unwanted)


def apo_zero_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): 1 - sigmoid(b (c - c')) + sigmoid(b (r - r')).

    For chosen answers that are better than the policy's own.
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): sigmoid(b (c - c')) + 1 - sigmoid(b h).

    For chosen answers that are worse than the policy's own: it lowers both, the rejected one more.
    """
    return torch.sigmoid(settings.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(settings.beta * pairs.difference)


def bco_pair_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """BCO (Jung et al. 2024, eq. 9): -log sigmoid(b (c - c') - s) - log sigmoid(s - b (r - r')).

    The shift s is the running mean of the rewards of all answers so far. (TRL leaves it out since version 1.)
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    shift = pairs.step.shift
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def nca_pair_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """NCA for two answers (Chen et al. 2024, eq. 13):
    -log sigmoid(b (c - c')) - 1/2 log sigmoid(-b (c - c')) - 1/2 log sigmoid(-b (r - r'))."""
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """SPPO (Wu et al. 2024, eq. 4.7) where the chosen answer wins with probability 1:
    (c - c' - 1 / (2 b))^2 + (r - r' + 1 / (2 b))^2; their eta is 1 / b."""
    half = 0.5 / settings.beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


def exo_pair_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """EXO for two answers (Ji et al. 2024, eq. 16): KL(q || p), where q = sigmoid(b h) is the policy's probability of
    the chosen answer and p = 1 - e the label's, smoothed by e > 0."""
    scaled, smoothing = _scaled(pairs, settings), torch.tensor(settings.label_smoothing)
    wanted = scaled.sigmoid() * (F.logsigmoid(scaled) - torch.log1p(-smoothing))
    unwanted = (-scaled).sigmoid() * (F.logsigmoid(-scaled) - smoothing.log())
    return wanted + unwanted


def aot_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """AOT on paired data (Melnyk et al. 2024, eq. 6): DPO's loss of sorted c - r against sorted c' - r'.

    Both are sorted over the whole step, so that the policy's preferences dominate the reference's as distributions.
    """
    step = pairs.step
    references = (step.reference_chosen - step.reference_rejected).sort().values
    mates = references[_ranks(step.chosen - step.rejected)[pairs.places]]
    return _smoothed(settings.beta * (pairs.chosen - pairs.rejected - mates), settings.label_smoothing)


def aot_unpaired_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """AOT on unpaired data (Melnyk et al. 2024, eq. 7): DPO's loss of sorted c - c' against sorted r - r'.

    Each answer's partner is the answer of the same rank among those of the other kind in the whole step. Partners may
    be in other micro-batches or on other ranks, so each side is moved against fixed values of the other: their sum has
    the gradient of the loss, and half of it is its value.
    """
    step = pairs.step
    chosen, rejected = step.chosen - step.reference_chosen, step.rejected - step.reference_rejected
    against_rejected = rejected.sort().values[_ranks(chosen)[pairs.places]]
    against_chosen = chosen.sort().values[_ranks(rejected)[pairs.places]]
    one = _smoothed(settings.beta * (pairs.chosen_ratio - against_rejected), settings.label_smoothing)
    other = _smoothed(settings.beta * (against_chosen - pairs.rejected_ratio), settings.label_smoothing)
    return one + other - (one + other).detach() / 2


def discopop_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, eq. 5): (1 - m) (-log sigmoid(b h)) + m exp(-b h), where
    m = sigmoid(b h / tau)."""
    scaled = settings.beta * pairs.difference
    modulation = torch.sigmoid(scaled / settings.discopop_tau)
    return -F.logsigmoid(scaled) * (1 - modulation) + torch.exp(-scaled) * modulation


def orpo_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6 and 7): -C - b log sigmoid(log odds(C) - log odds(R)), where C and R are the means
    of the answers' log-probabilities over their tokens, and odds(x) = exp(x) / (1 - exp(x)).

    The first term is the language-modelling loss of the chosen answer, without the prompt. `beta` is their lambda.
    """
    odds = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - settings.beta * F.logsigmoid(odds)


def simpo_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(b (C - R) - gamma), with means over tokens and no reference.

    Label smoothing and margins as in `sigmoid_loss`. The paper's beta is 2 to 2.5, its gamma about half of beta.
    """
    scaled = settings.beta * (pairs.chosen_mean - pairs.rejected_mean) - settings.simpo_gamma - pairs.margin
    return _smoothed(scaled, settings.label_smoothing)


def cpo_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """CPO (Xu et al. 2024, eq. 3 and 5): -log sigmoid(b (c - r)) - C, DPO without a reference, and the
    language-modelling loss of the chosen answer, per token as in the authors' code."""
    return _smoothed(settings.beta * (pairs.chosen - pairs.rejected), settings.label_smoothing) - pairs.chosen_mean


def sft_loss(pairs: Pairs, settings: Settings) -> Tensor:
    """-C, the language-modelling loss of the chosen answer: a term for weighted sums (MPO: Wang et al. 2024, eq. 2)."""
    return -pairs.chosen_mean


def kto_loss(answers: Labelled, settings: Settings) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8), where a is an answer's log-probability, a' its reference's, and z the KL:

        desirable      w (1 - sigmoid(b (a - a' - z)))
        undesirable    w (1 - sigmoid(b (z - (a - a'))))

    z is the mean of a - a' over mismatched pairs of a prompt and an answer of the whole step, but at least 0, and has
    no gradient (section 4.1).
    """
    reward = answers.answer - answers.reference - answers.step.kl
    desirable = settings.desirable_weight * (1 - torch.sigmoid(settings.beta * reward))
    undesirable = settings.undesirable_weight * (1 - torch.sigmoid(-settings.beta * reward))
    return torch.where(answers.label, desirable, undesirable)


def _scaled(pairs: Pairs, settings: Settings) -> Tensor:
    return settings.beta * pairs.difference - pairs.margin


def _smoothed(scaled: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of a pair whose label is wrong with probability `smoothing`."""
    loss = -F.logsigmoid(scaled)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * F.logsigmoid(-scaled)


def _ranks(values: Tensor) -> Tensor:
    """(M,) the place of each value among the sorted ones; equal values keep their order."""
    order = values.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _log_odds(mean_logprob: Tensor) -> Tensor:
    bounded = mean_logprob.clamp(max=LARGEST_MEAN_LOGPROB)
    return bounded - torch.log(-torch.expm1(bounded))
