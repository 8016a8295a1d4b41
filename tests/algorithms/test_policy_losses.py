"""Losses against numbers worked out by hand, and the properties that PPO relies on."""

import math

import pytest
import torch

from utils.algorithms.masking import lengths_to_mask, response_mask
from utils.algorithms.policy_losses import entropy_loss, policy_loss, value_loss

HALF = [torch.float16, torch.bfloat16]


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


# Policy ---------------------------------------------------------------------------------------------------------------


def policy_example():
    """Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with either sign of advantage, and one token that does not count."""
    ratio = torch.tensor([[1.5, 1.5, 0.5], [0.5, 1.1, 3.0]])
    old_logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.5, -1.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 2.0, 100.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    return old_logprobs + ratio.log(), old_logprobs, advantages, mask


def test_policy_loss_by_hand():
    logprobs, old_logprobs, advantages, mask = policy_example()
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=0.2, denominator=10)
    # -1.2 (clipped), 1.5, -0.5, 0.8 (clipped), -2.2
    assert loss.item() == pytest.approx(-1.6 / 10, abs=1e-6)
    assert stats["policy_loss"].item() == pytest.approx(-1.6, abs=1e-5)
    assert stats["tokens"].item() == 5
    assert stats["clip_count"].item() == 2
    assert stats["ratio_sum"].item() == pytest.approx(5.1, abs=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(1.5, abs=1e-6)
    log_ratios = [math.log(1.5)] * 2 + [math.log(0.5)] * 2 + [math.log(1.1)]
    assert stats["approx_kl_k1"].item() == pytest.approx(-sum(log_ratios), abs=1e-5)
    assert stats["approx_kl_k3"].item() == pytest.approx(sum(math.exp(x) - 1 - x for x in log_ratios), abs=1e-5)
    assert not any(value.requires_grad or value.dim() for value in stats.values())

    loss.backward()  # -advantage * ratio / denominator where the clip has not removed it
    expected = torch.tensor([[0.0, 0.15, -0.05], [0.0, -0.22, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_unchanged_policy_has_ratio_exactly_one(dtype):
    torch.manual_seed(0)
    logprobs = (-5 * torch.rand(8, 16)).to(dtype)
    mask = lengths_to_mask(torch.arange(1, 9) * 2, 16)
    advantages = torch.randn(8, 16)
    loss, stats = policy_loss(logprobs, logprobs.clone(), advantages, mask, 0.2, 72.0)
    assert stats["ratio_sum"].item() == stats["tokens"].item() == 72
    assert stats["ratio_max"].item() == 1
    assert stats["clip_count"].item() == stats["approx_kl_k1"].item() == stats["approx_kl_k3"].item() == 0
    torch.testing.assert_close(loss, -advantages[mask].mean(), rtol=0, atol=1e-6)


def test_minimising_the_policy_loss_makes_good_tokens_likelier():
    logits = torch.zeros(1, 4, requires_grad=True)
    for advantage, direction in ((1.0, 1), (-1.0, -1)):
        logprob = logits.log_softmax(-1)[:, 2:3]
        mask = torch.ones(1, 1, dtype=torch.bool)
        loss, _ = policy_loss(logprob, logprob.detach(), torch.full((1, 1), advantage), mask, 0.2, 1)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert -gradient[0, 2].item() * direction > 0


def test_the_decision_to_stop_is_trained_when_padding_is_eos():
    tokens = torch.tensor([[5, 6, 2, 2, 2]])
    logprobs = torch.full((1, 5), -1.0, requires_grad=True)
    mask = response_mask(tokens, eos_id=2)
    loss, _ = policy_loss(logprobs, logprobs.detach(), torch.ones(1, 5), mask, 0.2, 3)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1 / 3, -1 / 3, -1 / 3, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_policy_loss_of_extreme_ratios_stays_finite(dtype, advantage):
    logprobs = torch.tensor([[0.0, -60000.0]], dtype=dtype, requires_grad=True)
    old_logprobs = torch.tensor([[-60000.0, 0.0]], dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, old_logprobs, torch.full((1, 2), advantage), mask, 0.2, 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(value.isfinite() for value in stats.values())


@pytest.mark.parametrize("kind", ["approx_kl_k1", "approx_kl_k3"])
def test_approximate_kl_averages_to_the_divergence_from_the_old_policy(kind):
    """Each word of the vocabulary as a separate row, weighted by the old policy that would have sampled it."""
    old, new = torch.randn(2, 10, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    average = sum(
        old[i].exp() * policy_loss(new[i].view(1, 1), old[i].view(1, 1), torch.ones(1, 1), mask, 0.2, 1)[1][kind]
        for i in range(10)
    )
    torch.testing.assert_close(average, (old.exp() * (old - new)).sum(), rtol=0, atol=1e-6)


# Value ----------------------------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 1.0, 0.1, 77.0]], requires_grad=True)
    old_values = torch.zeros(1, 4)
    returns = torch.tensor([[2.0, -1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, stats = value_loss(values, old_values, returns, mask, cliprange_value=0.2, denominator=5)
    # 0.5 * (0.2 - 2)^2 = 1.62 (clipped), 0.5 * (1 + 1)^2 = 2, 0.5 * (0.1 - 1)^2 = 0.405
    assert loss.item() == pytest.approx(4.025 / 5, abs=1e-6)
    assert stats["value_loss"].item() == pytest.approx(4.025, abs=1e-6)
    assert stats["tokens"].item() == 3
    assert stats["value_clip_count"].item() == 1
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.4, -0.18, 0.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_value_loss_squares_in_fp32(dtype):
    values = torch.tensor([[300.0]], dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = value_loss(values, values.detach(), torch.tensor([[-300.0]], dtype=dtype), mask, 0.2, 1)
    assert loss.item() == 0.5 * 600**2  # twice what fp16 holds
    loss.backward()
    assert values.grad.item() == 600


# Entropy --------------------------------------------------------------------------------------------------------------


def test_the_entropy_bonus_raises_the_entropy():
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.5, 0.1, 0.0]]], requires_grad=True)
    mask = torch.tensor([[True, True]])

    def entropy_of(x):
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)

    before = entropy_of(logits)
    loss, stats = entropy_loss(before, mask, entropy_coef=0.5, denominator=4)
    assert stats["entropy"].item() == pytest.approx(before.sum().item(), abs=1e-6)
    assert loss.item() == pytest.approx(-0.5 * before.sum().item() / 4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    after = entropy_of(logits - 0.1 * gradient)  # one step of gradient descent
    assert (after > before).all()


# All token losses -----------------------------------------------------------------------------------------------------


def random_rollout(seed: int = 6):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages, returns, old_values = torch.randn(5, 8, 6, generator=generator)
    mask = lengths_to_mask(torch.tensor([6, 1, 2, 6, 3, 1, 5, 4]), 6)
    return {
        "new": new,
        "old": old,
        "old_values": old_values,
        "advantages": advantages,
        "returns": returns,
        "mask": mask,
    }


def losses_of(part, denominator):
    """The three token losses of a rollout, with `new` standing for log-probabilities, values and entropies alike."""
    mask = part["mask"]
    yield policy_loss(part["new"], part["old"], part["advantages"], mask, 0.2, denominator)
    yield value_loss(part["new"], part["old_values"], part["returns"], mask, 0.2, denominator)
    yield entropy_loss(part["new"], mask, 0.01, denominator)


@pytest.mark.parametrize("sizes", [[4, 4], [3, 1, 4], [1] * 8])
def test_micro_batches_over_a_global_denominator_add_up_to_the_whole_batch(sizes):
    rollout = random_rollout()
    rollout["new"].requires_grad_()
    tokens = rollout["mask"].sum()
    whole = list(losses_of(rollout, tokens))
    splits = {key: tensor.split(sizes) for key, tensor in rollout.items()}
    micro_batches = [{key: parts[i] for key, parts in splits.items()} for i in range(len(sizes))]
    parts = [list(losses_of(micro_batch, tokens)) for micro_batch in micro_batches]
    for kind, (loss, stats) in enumerate(whole):
        summed = sum(part[kind][0] for part in parts)
        torch.testing.assert_close(summed, loss, rtol=0, atol=1e-6)
        gradients = (torch.autograd.grad(x, rollout["new"], retain_graph=True)[0] for x in (summed, loss))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
        for key, value in stats.items():
            column = torch.stack([part[kind][1][key] for part in parts])
            torch.testing.assert_close(
                column.max() if key == "ratio_max" else column.sum(), value, rtol=1e-5, atol=1e-5
            )


def test_a_mean_of_micro_batch_means_would_be_another_loss():
    """What the global denominator is for: ragged micro-batches would weigh their tokens differently."""
    rollout = random_rollout()
    whole, _ = next(losses_of(rollout, rollout["mask"].sum()))
    halves = [{key: tensor[rows] for key, tensor in rollout.items()} for rows in (slice(0, 2), slice(2, 8))]
    means = [next(losses_of(half, half["mask"].sum()))[0] for half in halves]
    assert abs(sum(means) / 2 - whole) > 1e-2


def test_nothing_behind_the_mask_reaches_a_loss_or_a_gradient():
    clean = random_rollout()
    tokens = clean["mask"].sum()
    for garbage in (float("nan"), float("inf"), float("-inf"), 1e30):
        dirty = {key: x if key == "mask" else x.masked_fill(~clean["mask"], garbage) for key, x in clean.items()}
        for rollout in (clean, dirty):
            rollout["new"] = rollout["new"].detach().requires_grad_()
        for (loss, stats), (expected, expected_stats) in zip(
            losses_of(dirty, tokens), losses_of(clean, tokens), strict=True
        ):
            assert torch.equal(loss, expected)
            assert all(torch.equal(stats[key], expected_stats[key]) for key in stats)
            (gradient,) = torch.autograd.grad(loss, dirty["new"])
            (expected_gradient,) = torch.autograd.grad(expected, clean["new"])
            assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", HALF)
def test_losses_of_half_precision_inputs_are_fp32(dtype):
    rollout = {key: x if key == "mask" else x.to(dtype) for key, x in random_rollout().items()}
    for loss, stats in losses_of(rollout, rollout["mask"].sum()):
        assert loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in stats.values())


def test_statistics_are_of_the_true_ratio_and_the_loss_of_the_bounded_one():
    """A policy that explodes must show in the metrics: the bounded ratio would be e^20 in every such run."""
    old, mask = torch.zeros(1, 3), torch.tensor([[True, True, True]])
    new = torch.tensor([[30.0, -25.0, 0.0]], requires_grad=True)
    loss, stats = policy_loss(new, old, torch.tensor([[-1.0, 1.0, 1.0]]), mask, 0.2, 3.0)
    loss.backward()
    assert new.grad.isfinite().all()
    assert loss.item() == pytest.approx((math.exp(20) - math.exp(-20) - 1) / 3, rel=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(math.exp(30), rel=1e-5)
    assert stats["approx_kl_k1"].item() == pytest.approx(-5.0)
    assert stats["approx_kl_k3"].item() == pytest.approx(math.exp(30) - 31 + math.exp(-25) - 1 + 25, rel=1e-5)
    infinite = torch.tensor([[1000.0, 0.0, 0.0]])
    assert all(value.isfinite() for value in policy_loss(infinite, old, old, mask, 0.2, 3.0)[1].values())
