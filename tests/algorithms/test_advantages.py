"""GAE against its definition, and whitening that does not depend on how a rollout is spread over ranks."""

import pytest
import torch

from utils.algorithms.advantages import explained_variance, gae, masked_moments, moments_to_mean_var, whiten
from utils.algorithms.masking import lengths_to_mask


def gae_by_definition(rewards, values, length, gamma, lam):
    """sum_k (gamma * lam)^k * delta_{t+k}, term by term, for one row of python floats."""
    value = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


def test_gae_by_hand():
    # delta = 0.1, 0.1, 0.7; advantage = 0.7, 0.1 + 0.95 * 0.7, 0.1 + 0.95 * 0.765 from the right.
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.1, 0.2, 0.3, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.82675, 0.765, 0.7, 0.0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, torch.tensor([[0.92675, 0.965, 1.0, 0.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_definition_on_ragged_rows(gamma, lam):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 2, 5, 7, 7, 3])
    rewards, values = torch.randn(2, 6, 7, generator=generator)
    advantages, returns = gae(rewards, values, lengths_to_mask(lengths, 7), gamma, lam)
    for row, length in enumerate(lengths.tolist()):
        expected = gae_by_definition(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        expected_row = torch.tensor(expected + [0.0] * (7 - length))
        torch.testing.assert_close(advantages[row], expected_row, rtol=0, atol=2e-6)
        expected_returns = torch.tensor([a + v for a, v in zip(expected, values[row].tolist(), strict=False)])
        torch.testing.assert_close(returns[row, :length], expected_returns, rtol=0, atol=2e-6)
        assert returns[row, length:].eq(0).all()


def test_gae_with_lam_1_is_the_monte_carlo_return():
    torch.manual_seed(0)
    rewards = torch.tensor([[0.5, -1.0, 2.0]])
    _, returns = gae(rewards, torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[1.5, 1.0, 2.0]]), rtol=0, atol=1e-6)


def test_gae_reads_nothing_outside_the_mask_and_keeps_no_gradient():
    torch.manual_seed(0)
    mask = lengths_to_mask(torch.tensor([2, 4]), 4)
    clean_rewards, clean_values = torch.randn(2, 2, 4)
    dirty_rewards, dirty_values = (x.masked_fill(~mask, float("nan")) for x in (clean_rewards, clean_values))
    expected = gae(clean_rewards, clean_values, mask, 1.0, 0.95)
    actual = gae(dirty_rewards, dirty_values.requires_grad_(), mask, 1.0, 0.95)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_gae_of_a_row_does_not_depend_on_the_padding_width():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 4)
    narrow, _ = gae(rewards, values, torch.ones(3, 4, dtype=torch.bool), 1.0, 0.95)
    wide_mask = lengths_to_mask(torch.full((3,), 4), 9)
    padded = (torch.nn.functional.pad(x, (0, 5), value=3.0) for x in (rewards, values))
    wide, _ = gae(*padded, wide_mask, 1.0, 0.95)
    assert torch.equal(wide[:, :4], narrow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gae_computes_in_fp32(dtype):
    rewards = torch.zeros(1, 4, dtype=dtype)
    values = torch.tensor([[60000.0, -60000.0, 60000.0, -60000.0]]).to(dtype)
    advantages, returns = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.isfinite().all() and returns.isfinite().all()


def test_moments_by_hand():
    x = torch.tensor([[1.0, 2.0, float("nan")], [6.0, float("inf"), 0.0]])
    moments = masked_moments(x, torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    assert moments.dtype == torch.float64
    assert moments.tolist() == [3.0, 9.0, 41.0]
    mean, var = moments_to_mean_var(moments)
    assert mean.item() == 3.0
    assert var.item() == pytest.approx(14 / 3, abs=1e-12)  # ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3


def test_moments_of_nothing():
    mean, var = moments_to_mean_var(masked_moments(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)))
    assert (mean.item(), var.item()) == (0.0, 0.0)


def test_moments_keep_the_variance_of_numbers_far_from_zero():
    x = 10_000 + torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    _, var = moments_to_mean_var(masked_moments(x, torch.ones(1, 4, dtype=torch.bool)))
    assert var.item() == pytest.approx(1.25, abs=1e-6)


@pytest.mark.parametrize("rows_per_rank", [[8], [4, 4], [1, 7], [3, 1, 2, 2]])
def test_whitening_over_ranks_equals_whitening_the_whole_rollout(rows_per_rank):
    generator = torch.Generator().manual_seed(2)
    x = 5 + 3 * torch.randn(8, 6, generator=generator)
    mask = lengths_to_mask(torch.tensor([6, 1, 3, 2, 6, 4, 5, 1]), 6)
    counted = x[mask].double()
    expected = torch.where(mask, (x - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt(), 0).float()

    ranks = list(zip(x.split(rows_per_rank), mask.split(rows_per_rank), strict=True))
    mean, var = moments_to_mean_var(sum(masked_moments(*rank) for rank in ranks))
    whitened = torch.cat([whiten(*rank, mean, var) for rank in ranks])
    torch.testing.assert_close(whitened, expected, rtol=0, atol=1e-6)
    assert whitened.dtype == torch.float32
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whitening_keeps_good_answers_above_bad_ones():
    """Normalised row by row, both rows would come out the same and the score would teach nothing."""
    x = torch.tensor([[2.0, 2.1, 1.9], [-2.0, -2.1, -1.9]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    whitened = whiten(x, mask, *moments_to_mean_var(masked_moments(x, mask)))
    assert (whitened[0] > 0.9).all() and (whitened[1] < -0.9).all()


def test_whitening_ignores_padding():
    """With an unmasked mean, the padding of short answers would shift every advantage."""
    x, padded = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0, 0.0, 0.0, 100.0]])
    mask, padded_mask = torch.ones(1, 2, dtype=torch.bool), lengths_to_mask(torch.tensor([2]), 5)
    plain = whiten(x, mask, *moments_to_mean_var(masked_moments(x, mask)))
    whitened = whiten(padded, padded_mask, *moments_to_mean_var(masked_moments(padded, padded_mask)))
    assert torch.equal(whitened[:, :2], plain)
    assert whitened[:, 2:].eq(0).all()


def test_whitening_without_shift_keeps_the_mean():
    x = torch.tensor([[4.0, 8.0, 50.0]])  # mean 6, standard deviation 2 of the first two
    mask = torch.tensor([[True, True, False]])
    whitened = whiten(x, mask, 6.0, 4.0, shift_mean=False)
    torch.testing.assert_close(whitened, torch.tensor([[5.0, 7.0, 0.0]]), rtol=0, atol=1e-6)


def test_whitening_a_constant_is_finite():
    x, mask = torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)
    assert whiten(x, mask, *moments_to_mean_var(masked_moments(x, mask))).eq(0).all()


def test_explained_variance():
    mask = lengths_to_mask(torch.tensor([3, 2]), 3)
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")]])  # variance 2 over the five that count

    def explained(values):
        return explained_variance(masked_moments(returns, mask), masked_moments(returns - values, mask)).item()

    assert explained(returns) == 1.0
    assert explained(torch.full((2, 3), 7.0)) == 0.0
    assert explained(-returns) == pytest.approx(1 - 8 / 2, abs=1e-12)  # residual 2 * returns: four times the variance
    constant = masked_moments(torch.ones(2, 3), mask)
    assert explained_variance(constant, masked_moments(returns, mask)).item() == 0.0
