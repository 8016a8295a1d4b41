"""Sampling: the distribution, the filters, and random streams that belong to rows."""

import pytest
import torch

from utils.generation.sampling import RowSampling, SamplingParams, choose_tokens, invert, mix, row_keys, uniform

pytestmark = [
    pytest.mark.usefixtures("operations"),
    pytest.mark.parametrize("operations", ["compiled", "PyTorch"], indirect=True),
]


def draw(logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    """`count` independent draws from one row of logits."""
    keys, counters = torch.full((count,), 77), torch.arange(count)
    sampling = alike(SamplingParams(max_new_tokens=1, **params), count)
    tokens, _ = choose_tokens(logits.repeat(count, 1), sampling, keys, counters, eos_id=0)
    return tokens


def alike(sampling: SamplingParams, rows: int) -> RowSampling:
    """The same parameters for each of `rows` rows."""
    return RowSampling.of([sampling] * rows)


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert not observed[expected == 0].any()
    kept = expected > 0
    return ((observed - expected)[kept].square() / expected[kept]).sum().item()


LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, float("-inf")]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    probabilities = torch.softmax(LOGITS[0] / temperature, -1)
    statistic = chi_square(draw(LOGITS, 20_000, temperature=temperature), probabilities)
    assert statistic < 22.5  # 6 degrees of freedom, p = 0.001


def test_top_k_keeps_the_k_most_likely():
    probabilities = torch.softmax(LOGITS[0], -1) * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    assert chi_square(draw(LOGITS, 20_000, top_k=3), probabilities / probabilities.sum()) < 13.9  # 2 degrees


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draw(p, 500, top_p=0.5).tolist()) == {0}
    assert set(draw(p, 500, top_p=0.51).tolist()) == {0, 1}
    assert set(draw(p, 500, top_p=0.9).tolist()) == {0, 1, 2}
    unsorted = p[:, [3, 0, 2, 1]]
    assert set(draw(unsorted, 500, top_p=0.75).tolist()) == {1, 3}


def test_greedy_takes_the_largest_and_reports_its_log_probability():
    sampling = SamplingParams(max_new_tokens=1, greedy=True, temperature=0.1, top_k=1)
    keys = torch.zeros(1, dtype=torch.int64)
    tokens, logprobs = choose_tokens(LOGITS.clone(), alike(sampling, 1), keys, keys, eos_id=7)
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(torch.log_softmax(LOGITS[0], -1)[0].item())


def test_log_probabilities_are_those_of_the_unfiltered_distribution():
    count = 50
    sampling = SamplingParams(max_new_tokens=1, temperature=0.7, top_k=2)
    keys, counters = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    tokens, logprobs = choose_tokens(LOGITS.repeat(count, 1), alike(sampling, count), keys, counters, eos_id=7)
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS[0] / 0.7, -1)[tokens])


def test_no_end_before_the_minimum():
    sampling = SamplingParams(max_new_tokens=9, min_new_tokens=3, greedy=True)
    keys = torch.zeros(4, dtype=torch.int64)
    tokens, _ = choose_tokens(LOGITS.repeat(4, 1), alike(sampling, 4), keys, torch.tensor([0, 1, 2, 3]), eos_id=0)
    assert tokens.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("vocabulary", [4096, 5000, 32_000])
def test_a_large_vocabulary_is_searched_like_a_small_one(vocabulary):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, vocabulary, generator=generator, dtype=torch.float32).pow(8)
    weights[:, ::3] = 0.0
    weights[0] = 0.0
    weights[0, 77] = 1e-20  # all of the weight on one word
    quantiles = torch.linspace(0, 1 - 2.0**-23, 64)[:, None]
    found = invert(weights, quantiles)
    assert found[0] == 77 and (weights.gather(1, found[:, None]) > 0).all()
    wide = weights.double().cumsum(-1)
    share = wide / wide[:, -1:]
    after = share.gather(1, found[:, None])
    before = after - weights.double().gather(1, found[:, None]) / wide[:, -1:]
    assert (before <= quantiles + 1e-5).all() and (quantiles <= after + 1e-5).all()


@pytest.mark.parametrize("vocabulary", [7, 5000])  # searched in one level, and in blocks of which the last is not full
@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_not_numbers_give_a_word_of_the_vocabulary(vocabulary, greedy):
    """A model that has diverged must show in its loss, not in an index out of bounds, which is fatal on a GPU."""
    logits = torch.randn(3, vocabulary)
    logits[0] = float("nan")
    logits[1, -1] = float("nan")
    logits[2] = float("-inf")
    sampling = SamplingParams(max_new_tokens=1, greedy=greedy)
    tokens, _ = choose_tokens(logits, alike(sampling, 3), torch.arange(3), torch.arange(3), eos_id=0)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


def test_uniform_numbers_are_uniform_and_uncorrelated():
    keys = row_keys(3, range(64))
    numbers = torch.stack([uniform(keys, torch.full((64,), place)) for place in range(256)]).double()
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert abs(numbers.mean().item() - 0.5) < 0.01 and abs(numbers.var().item() - 1 / 12) < 0.003
    histogram = torch.histc(numbers.float(), 16, 0, 1)
    assert ((histogram - 1024).square() / 1024).sum().item() < 37.7  # 15 degrees
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * other).mean().item() * 12) < 0.03


def test_mix_is_splitmix64():
    """First outputs of the reference generator with seed 1234567 (Vigna's splitmix64.c)."""
    state, outputs = torch.tensor([1234567]), []
    for _ in range(3):
        outputs.append(mix(state).item() % 2**64)
        state = state + -0x61C8864680B583EB
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_streams_depend_on_the_seed_and_the_number_of_the_row_alone():
    first = row_keys(1, [0, 1, 5])
    assert len(set(first.tolist())) == 3
    assert row_keys(1, [5, 0]).tolist() == [first[2].item(), first[0].item()]
    assert not set(row_keys(2, range(100)).tolist()) & set(row_keys(1, range(100)).tolist())
