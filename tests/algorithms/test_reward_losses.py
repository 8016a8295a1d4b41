"""Losses of pairs against numbers worked out by hand and the formulae of peers."""

import math

import pytest
import torch

from utils.algorithms.masking import lengths_to_mask
from utils.algorithms.reward_losses import (
    Pairs,
    centering_penalty,
    last_token_loss,
    pairwise_loss,
    token_span_loss,
    token_span_pairwise_loss,
    total_loss,
)
from utils.arguments.choices import PAIRWISE_LOSSES

HALF = [torch.float16, torch.bfloat16]


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_pairwise_loss_by_hand():
    loss = pairwise_loss(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
    expected = torch.tensor([0.31326168751822286, 0.6931471805599453, 2.1269280110429727])
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)


def test_pairwise_loss_equals_trl():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 32, 1)
    trl = -torch.nn.functional.logsigmoid(chosen - rejected).mean()  # RewardTrainer's loss without a margin
    torch.testing.assert_close(pairwise_loss(chosen[:, 0], rejected[:, 0]).mean(), trl, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", HALF)
def test_pairwise_loss_of_extreme_scores_is_finite(dtype):
    """The difference alone leaves the range of fp16; log(sigmoid(x)) would be -inf from x = -18 on."""
    chosen = torch.tensor([-60000.0, 60000.0, -30.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([60000.0, -60000.0, 0.0], dtype=dtype)
    loss = pairwise_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), (rejected.float() - chosen.detach().float()).clamp(min=0))
    loss.sum().backward()
    assert chosen.grad.tolist() == [-1.0, 0.0, -1.0]


def span_inputs():
    """The example of the docstring: two prompt tokens, answers "a b EOS" and "c EOS", padded with EOS."""
    p, a, b, c, eos = 9, 10, 11, 12, 2
    return {
        "chosen_values": torch.tensor([[5.0, -5.0, 1.0, 2.0, 3.0, float("nan")]]),
        "rejected_values": torch.tensor([[-7.0, 7.0, 0.0, 1.0, float("nan"), float("inf")]]),
        "chosen_ids": torch.tensor([[p, p, a, b, eos, eos]]),
        "rejected_ids": torch.tensor([[p, p, c, eos, eos, eos]]),
        "chosen_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "rejected_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }


def test_token_span_loss_by_hand():
    # Columns 2 to 4; differences 1 - 0, 2 - 1, 3 - 1: the rejected side holds its last value. Padding is never read.
    expected = (softplus(-1) + softplus(-1) + softplus(-2)) / 3
    assert token_span_pairwise_loss(**span_inputs()).item() == pytest.approx(expected, abs=1e-7)


def test_token_span_loss_sends_no_gradient_into_prompt_or_padding():
    inputs = span_inputs()
    for side in ("chosen_values", "rejected_values"):
        inputs[side].requires_grad_()
    token_span_pairwise_loss(**inputs).sum().backward()
    assert inputs["chosen_values"].grad.ne(0).tolist() == [[False, False, True, True, True, False]]
    assert inputs["rejected_values"].grad.ne(0).tolist() == [[False, False, True, True, False, False]]


def deepspeed_chat_loss(chosen_values, rejected_values, chosen_ids, rejected_ids, chosen_length, rejected_length):
    """The original's arithmetic for one pair, with real lengths in place of its search for padding tokens."""
    divergence = (chosen_ids != rejected_ids).nonzero()[0].item()
    end = max(chosen_length, rejected_length)
    difference = chosen_values[divergence:end] - rejected_values[divergence:end]
    return -torch.nn.functional.logsigmoid(difference).mean()


def test_token_span_loss_equals_deepspeed_chat_on_pairs_of_equal_length():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([4, 9, 12, 7, 5, 12])
    mask = lengths_to_mask(lengths, 12)
    chosen_ids, rejected_ids = torch.randint(3, 6, (2, 6, 12), generator=generator)
    rejected_ids[:, :2] = chosen_ids[:, :2]
    rejected_ids[:, 3] = chosen_ids[:, 3] + 1  # every pair differs somewhere before its end
    chosen_ids, rejected_ids = (ids.masked_fill(~mask, 0) for ids in (chosen_ids, rejected_ids))
    values = torch.randn(2, 6, 12, generator=generator)
    expected = [
        deepspeed_chat_loss(*row)
        for row in zip(*values, chosen_ids, rejected_ids, lengths.tolist(), lengths.tolist(), strict=True)
    ]
    loss = token_span_pairwise_loss(*values, chosen_ids, rejected_ids, mask, mask)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=0, atol=1e-6)


def test_token_span_loss_when_one_answer_continues_the_other():
    """The longer answer continues with the token that pads the shorter: only the masks show where they diverge."""
    ids = torch.tensor([[9, 10, 2, 2, 2]])
    values = torch.tensor([[0.0, 1.0, 2.0, 4.0, 1.0]]), torch.tensor([[0.0, 1.0, 2.0, 50.0, 60.0]])
    masks = torch.tensor([[1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    loss = token_span_pairwise_loss(*values, ids, ids, *masks)
    assert loss.item() == pytest.approx((softplus(-2) + softplus(1)) / 2, abs=1e-7)  # 4 and 1 against the 2 held


def test_token_span_loss_of_identical_answers_is_log_2():
    ids, mask = torch.tensor([[9, 10, 2, 0]]), torch.tensor([[1, 1, 1, 0]])
    values = torch.tensor([[3.0, 1.0, 2.0, float("nan")]])
    assert token_span_pairwise_loss(values, values, ids, ids, mask, mask).item() == pytest.approx(math.log(2), abs=1e-7)


def test_losses_of_the_table_read_what_they_need_of_the_pairs():
    """Chosen rows first; the score is the value at the last token of the response, whatever the padding is."""
    pairs = Pairs(
        values=torch.tensor([[9.0, 1.0, 2.0, 7.0], [9.0, 3.0, 8.0, 8.0]]),
        input_ids=torch.tensor([[5, 6, 2, 0], [5, 2, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        response_mask=torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool(),
        row_mask=torch.tensor([True]),
        margin=torch.tensor([0.0]),
        source=torch.tensor([0]),
    )
    assert [score.tolist() for score in pairs.scores] == [[2.0], [3.0]]
    assert PAIRWISE_LOSSES["last_token"].load() is last_token_loss
    assert PAIRWISE_LOSSES["token_span"].load() is token_span_loss
    assert last_token_loss(pairs).item() == pytest.approx(softplus(1.0))
    assert token_span_loss(pairs).item() == pytest.approx((softplus(2.0) + softplus(1.0)) / 2)


# --- margins, label smoothing, centring ------------------------------------------------------------------------------


def make_pairs(margin: list[float], **changes) -> Pairs:
    """Three pairs of a prompt token and up to three response tokens; the first difference is in column 1."""
    lengths = torch.tensor([3, 4, 2, 4, 2, 3])
    mask = lengths_to_mask(lengths, 4)
    generator = torch.Generator().manual_seed(1)
    values = 2 * torch.randn(6, 4, generator=generator)
    fields = {
        "values": values.masked_fill(~mask, float("nan")),  # never to be read
        "input_ids": torch.cat([torch.full((3, 4), 7), torch.full((3, 4), 8)]),
        "attention_mask": mask.long(),
        "response_mask": mask & (torch.arange(4) > 0),
        "row_mask": torch.ones(3, dtype=torch.bool),
        "margin": torch.tensor(margin),
        "source": torch.zeros(3, dtype=torch.long),
    }
    return Pairs(**fields | changes)


def columns_of(pairs: Pairs, index: int) -> list[tuple[float, float]]:
    """Chosen and rejected value of each column in the span of a pair, by hand: the shorter one keeps its last value."""
    sides = [pairs.values[row][pairs.attention_mask[row].bool()].tolist() for row in (index, index + 3)]
    length = max(map(len, sides))
    return list(zip(*(side + side[-1:] * (length - len(side)) for side in sides), strict=True))


def log_sigmoid(x: float) -> float:
    return -softplus(-x)


@pytest.mark.parametrize("loss", [last_token_loss, token_span_loss])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("own", "constant"), [([0.0, 0.0, 0.0], 0.5), ([1 / 3, 2 / 3, 1.0], 0.0)])
def test_margin_and_label_smoothing_by_hand(loss, smoothing, own, constant):
    """(1 - e)(-log sigmoid(d)) + e (-log sigmoid(-d)), d = chosen - rejected - margin."""
    pairs = make_pairs(own)
    expected = []
    for index, margin in enumerate(own):
        columns = columns_of(pairs, index)[-1:] if loss is last_token_loss else columns_of(pairs, index)
        differences = [chosen - rejected - margin - constant for chosen, rejected in columns]
        losses = [-(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d) for d in differences]
        expected.append(sum(losses) / len(losses))
    losses = total_loss(loss, pairs, margin=constant, label_smoothing=smoothing)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("loss", [last_token_loss, token_span_loss])
def test_with_the_defaults_the_total_is_the_loss_itself(loss):
    pairs = make_pairs([0.0] * 3)
    chosen, rejected = pairs.scores
    assert torch.equal(total_loss(loss, pairs), loss(pairs))
    assert torch.equal(last_token_loss(pairs), -torch.nn.functional.logsigmoid(chosen - rejected))


def test_centring_is_that_of_trl():
    """RewardTrainer adds center_rewards_coefficient * mean((chosen + rejected)^2) to the mean loss."""
    pairs = make_pairs([0.5] * 3)
    chosen, rejected = pairs.scores
    trl = -torch.nn.functional.logsigmoid(chosen - rejected - 0.5).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
    torch.testing.assert_close(total_loss(last_token_loss, pairs, center_coefficient=0.01).mean(), trl)
    assert centering_penalty(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, -1.5])).tolist() == [0.0, 12.25]


def test_a_smoothed_loss_is_least_where_the_model_is_as_sure_as_the_labels():
    """Its gradient is 0 at sigmoid(d) = 1 - e: confidence beyond that is punished, without smoothing it never is."""
    difference = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    ids, mask = torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool)
    values = torch.stack([difference, torch.zeros(1)])
    others = {"margin": torch.zeros(1), "source": torch.zeros(1, dtype=torch.long), "row_mask": torch.ones(1).bool()}
    pairs = Pairs(values=values, input_ids=ids, attention_mask=mask, response_mask=mask, **others)
    (gradient,) = torch.autograd.grad(total_loss(last_token_loss, pairs, label_smoothing=0.1).sum(), difference)
    assert gradient.item() == pytest.approx(0, abs=1e-6)
