"""Every epoch but the first groups the rows into other minibatches, and the rows stay unchanged."""

import pytest
import torch
from rlhf_setup import make_config

from utils.rlhf.experience import Experience
from utils.rlhf.minibatches import minibatches

PATHS = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c"}
LENGTHS = [(3, 5), (1, 2), (7, 1), (2, 9), (4, 4), (5, 1), (6, 3), (1, 1)]  # tokens of prompt and response of each row


def experience(rows: list[int]) -> Experience:
    """Numbers that tell rows and columns apart, padded as rollouts are."""
    prompt, response = (max(LENGTHS[row][part] for row in rows) for part in (0, 1))
    mask = torch.tensor([[column < LENGTHS[row][1] for column in range(response)] for row in rows])
    prompt_mask = torch.tensor([[column >= prompt - LENGTHS[row][0] for column in range(prompt)] for row in rows])
    attention_mask = torch.cat([prompt_mask, mask], 1)
    place = attention_mask.cumsum(1)
    ids = torch.tensor(rows)[:, None] * 100 + place

    def numbers(offset: float) -> torch.Tensor:
        return (torch.tensor(rows)[:, None] * 100 + torch.arange(response) + offset) * mask

    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    return Experience(
        rows=tuple(rows),
        sequences=ids * attention_mask,
        attention_mask=attention_mask,
        response_mask=mask,
        scores=torch.tensor(rows) + 0.5,
        **{name: numbers(0.1 * index) for index, name in enumerate(names, 1)},
    )


def content(batch: Experience, place: int) -> dict[str, list]:
    """A row without its padding."""
    width, found = batch.response_mask.size(1), {"rows": batch.rows[place], "score": batch.scores[place].item()}
    for name in ("sequences", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        tensor = getattr(batch, name)[place]
        mask = batch.attention_mask[place] if len(tensor) > width else batch.response_mask[place]
        found[name] = tensor[mask].tolist()
        assert not tensor[~mask].any()
    return found


def rows_of(minibatch) -> list[int]:
    return [row for batch in minibatch for row in batch.rows]


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_batch": 26}], ids=["rows", "tokens"])
def test_each_epoch_has_every_row_once_as_it_was(changes):
    config = make_config(PATHS, ppo_epochs=3, **changes)
    rollout = [[experience([0, 1]), experience([2, 3])], [experience([4, 5]), experience([6, 7])]]
    found = list(minibatches(rollout, config, seed=4))
    assert len(found) == 6 and {len(rows_of(minibatch)) for minibatch in found} == {4}
    for epoch in range(3):
        steps = found[2 * epoch : 2 * epoch + 2]
        assert sorted(row for step in steps for row in rows_of(step)) == list(range(8))
        for batch in (batch for step in steps for batch in step):
            for place, row in enumerate(batch.rows):
                assert content(batch, place) == content(experience([row]), 0)
            lengths = [LENGTHS[row] for row in batch.rows]
            assert batch.prompt_columns == max(prompt for prompt, _ in lengths)
            assert batch.response_mask.size(1) == max(response for _, response in lengths)
            if changes and epoch:
                assert sum(map(sum, lengths)) <= 26
    together = [{frozenset(rows_of(step)) for step in found[start : start + 2]} for start in (0, 2, 4)]
    assert together[0] != together[1] != together[2], "rows meet others in other epochs"
    first = sorted(found[:2], key=rows_of)
    assert [list(map(id, step)) for step in first] == [list(map(id, step)) for step in rollout], (
        "those that were scored"
    )


def test_the_seed_decides():
    config = make_config(PATHS, ppo_epochs=2)
    rollout = [[experience([0, 1]), experience([2, 3])], [experience([4, 5]), experience([6, 7])]]
    orders = [[rows_of(step) for step in minibatches(rollout, config, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_single_minibatch_stays_as_it_was_scored():
    config = make_config(PATHS, ppo_epochs=2)
    rollout = [[experience([0, 1]), experience([2, 3])]]
    assert all(minibatch is rollout[0] for minibatch in minibatches(rollout, config, seed=1))
