"""The KL estimators against the divergence itself, and the token that receives the score of a response."""

import math

import pytest
import torch

from utils.algorithms.kl import adaptive_kl_ctl, kl_penalty, normalize_scores, per_token_rewards
from utils.algorithms.masking import response_mask


@pytest.mark.parametrize(
    "estimator, expected",
    [
        ("k1", [0.0, 0.5, -0.5, 2.0]),
        ("k2", [0.0, 0.125, 0.125, 2.0]),
        ("k3", [0.0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, math.exp(-2.0) + 1.0]),
    ],
)
def test_estimators_by_hand(estimator, expected):
    logprobs = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-1.0, -1.5, -0.5, -3.0]])
    kl = kl_penalty(logprobs, ref_logprobs, estimator, clamp=10.0)
    torch.testing.assert_close(kl, torch.tensor([expected]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence_from_policy_to_reference(estimator):
    """Summed over the vocabulary with the policy's probabilities, exactly; the other direction gives another number."""
    policy, reference = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    other_way = (reference.exp() * (reference - policy)).sum()
    average = (policy.exp() * kl_penalty(policy, reference, estimator, clamp=100.0)).sum()
    torch.testing.assert_close(average, divergence, rtol=0, atol=1e-6)
    assert abs(divergence - other_way) > 1e-2


def test_k2_and_k3_are_never_negative():
    torch.manual_seed(0)
    logprobs, ref_logprobs = torch.randn(2, 50, 50)
    for estimator in ("k2", "k3"):
        assert (kl_penalty(logprobs, ref_logprobs, estimator, 10.0) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_extremes_are_clamped(estimator, dtype):
    logprobs = torch.tensor([[-60000.0, 0.0]]).to(dtype)
    kl = kl_penalty(logprobs, logprobs.flip(1), estimator, clamp=10.0)
    assert kl.dtype == torch.float32
    assert kl.tolist() == [[-10.0 if estimator == "k1" else 10.0, 10.0]]


def test_k3_keeps_its_digits_near_zero():
    """exp(-d) - 1 + d loses everything to rounding in fp32 when d is small."""
    logprobs = torch.tensor([[1e-3]])
    kl = kl_penalty(logprobs, torch.zeros(1, 1), "k3", 10.0)
    assert kl.item() == pytest.approx(math.expm1(-1e-3) + 1e-3, rel=1e-3)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4", 10.0)


def test_the_score_lands_on_the_last_response_token():
    eos = 2
    tokens = torch.tensor([[5, 6, eos, eos], [eos, eos, eos, eos], [5, 6, 7, 8], [5, 6, 7, eos]])  # pad == eos
    kl = torch.tensor([[0.1, 0.2, 0.3, 7.0], [0.5, 7.0, 7.0, float("nan")], [0.0] * 4, [-0.1, 0.0, 0.0, 0.1]])
    rewards = per_token_rewards(torch.tensor([1.0, -2.0, 3.0, 4.0]), kl, response_mask(tokens, eos), kl_ctl=0.1)
    expected = [[-0.01, -0.02, 0.97, 0.0], [-2.05, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0], [0.01, 0.0, 0.0, 3.99]]
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=0, atol=1e-6)


def test_straying_from_the_reference_costs_reward():
    logprobs, ref_logprobs = torch.tensor([[-0.1, -0.1]]), torch.tensor([[-2.0, -2.0]])
    kl = kl_penalty(logprobs, ref_logprobs, "k1", 10.0)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert per_token_rewards(torch.zeros(1), kl, mask, 0.1).sum() < 0
    assert torch.equal(per_token_rewards(torch.ones(1), kl, mask, 0.0), torch.tensor([[0.0, 1.0]]))


def test_a_row_without_tokens_gets_no_reward():
    mask = torch.tensor([[False, False], [True, False]])
    rewards = per_token_rewards(torch.tensor([5.0, 6.0]), torch.zeros(2, 2), mask, 0.1)
    assert rewards.tolist() == [[0.0, 0.0], [6.0, 0.0]]


@pytest.mark.parametrize(
    "observed_kl, expected",
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 512 / 10000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10000)),  # error clipped at +0.2
        (5.4, 0.1 * (1 - 0.1 * 512 / 10000)),
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10000)),  # error clipped at -0.2
    ],
)
def test_adaptive_controller_by_hand(observed_kl, expected):
    assert adaptive_kl_ctl(0.1, observed_kl, 6.0, 10000, 512) == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_stays_positive_however_short_the_horizon():
    assert adaptive_kl_ctl(0.1, 0.0, 6.0, horizon=10, num_samples=100_000) == pytest.approx(0.08, rel=1e-12)


@pytest.mark.parametrize("observed_kl", [math.nan, math.inf])
def test_adaptive_controller_refuses_what_is_not_a_number(observed_kl):
    with pytest.raises(ValueError, match="observed KL"):
        adaptive_kl_ctl(0.1, observed_kl, 6.0, 10000, 512)


def test_normalize_scores():
    scores = torch.tensor([3.0, 1.0, -100.0, 100.0], dtype=torch.bfloat16)
    assert normalize_scores(scores, mean=1.0, std=4.0, clip=5.0).tolist() == [0.5, 0.0, -5.0, 5.0]
    assert normalize_scores(scores, mean=0.0, std=1.0, clip=5.0).tolist() == [3.0, 1.0, -5.0, 5.0]
    assert normalize_scores(torch.tensor([2.0]), mean=1.0, std=0.0, clip=5.0).tolist() == [5.0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_finite_where_the_estimate_saturates(estimator):
    """As in a loss: exp of 199 is infinite, and 0 times infinity is NaN."""
    logprobs = torch.tensor([[-199.0, -0.1, -1.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[0.0, -199.0, -1.5, -1000.0]])
    kl = kl_penalty(logprobs, reference, estimator, clamp=10.0)
    kl.sum().backward()
    assert kl.isfinite().all() and logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 2] == pytest.approx({"k1": 1.0, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[estimator])
    assert logprobs.grad[0, 0] == 0, "saturated"
