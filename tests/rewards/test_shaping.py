"""Sources of scores: what they receive, how their scores become rewards, and the messages of their failures."""

import pytest
import torch
from processes import run_ranks

from utils.arguments.ppo import RewardSourceArguments
from utils.errors import InputError
from utils.generation.responses import Responses, Stop
from utils.rewards.protocol import Answers
from utils.rewards.shaping import Reward

ROWS = [
    {"prompt_ids": [5], "prompt": "Name a colour:", "reference": "red", "columns": '{"id": 7, "tags": ["a"]}'},
    {"prompt_ids": [6, 7], "prompt": "Count:", "reference": None, "columns": "{}"},
    {"prompt_ids": [8], "prompt": "Say it:", "reference": "it", "columns": '{"id": 9}'},
]


def responses() -> Responses:
    """Three answers, of which the second was cut at the limit."""
    return Responses(
        tokens=torch.tensor([[70, 2, 0], [71, 72, 73], [74, 75, 2]]),
        mask=torch.tensor([[True, True, False], [True] * 3, [True] * 3]),
        stopped=torch.tensor([Stop.EOS, Stop.LENGTH, Stop.EOS]),
    )


class Source:
    """Scores by a function of the answers."""

    score_mean, score_std, module, is_collective = 1.0, 2.0, None, False

    def __init__(self, score) -> None:
        self._score = score

    def __call__(self, answers: Answers) -> torch.Tensor:
        return self._score(answers)


def reward(score, tokenizer=None, **flags) -> Reward:
    return Reward(Source(score), tokenizer, RewardSourceArguments(**flags))


def test_scores_are_normalised_clipped_and_less_without_an_end():
    given = torch.tensor([4.0, 2.0, -90.0])
    scores = reward(lambda _: given, clip_reward_value=1.25, missing_eos_penalty=0.5)(ROWS, responses())
    assert scores.raw.tolist() == [4.0, 2.0, -90.0]
    assert scores.shaped.tolist() == [1.25, 0.5 - 0.5, -1.25]  # (4 - 1) / 2 is 1.5, (2 - 1) / 2 is 0.5
    assert reward(lambda _: given).normalized(4.0) == 1.5


def test_no_source_is_normalised_without_the_flag():
    given = torch.tensor([4.0, 2.0, -3.0])
    unscaled = reward(lambda _: given, normalize_scores=False, missing_eos_penalty=0.0)
    assert unscaled(ROWS, responses()).shaped.tolist() == given.tolist() and unscaled.normalized(4.0) == 4.0


def test_a_source_sees_ids_texts_references_and_the_other_columns(tiny_tokenizer):
    seen = []

    def score(answers: Answers) -> torch.Tensor:
        seen.append(answers)
        return torch.zeros(len(answers))

    reward(score, tiny_tokenizer)(ROWS, responses())
    (answers,) = seen
    assert answers.prompt_ids == [[5], [6, 7], [8]] and answers.prompts == ["Name a colour:", "Count:", "Say it:"]
    assert answers.references == ["red", None, "it"]
    assert answers.columns == [{"id": 7, "tags": ["a"]}, {}, {"id": 9}]
    texts = [tiny_tokenizer.decode(ids) for ids in ([70], [71, 72, 73], [74, 75])]
    assert answers.texts == texts and "</s>" not in "".join(texts)


def failing(answers: Answers) -> torch.Tensor:
    raise KeyError("no such unit")


@pytest.mark.parametrize(
    ("score", "line"),
    [
        (failing, "KeyError: 'no such unit'"),
        (lambda _: torch.zeros(2), "gave (2,) instead of a tensor with 3 scores"),
        (lambda _: torch.zeros(3, 1), "gave (3, 1) instead of a tensor with 3 scores"),
        (lambda _: [1.0, 2.0, 3.0], "gave list instead of a tensor with 3 scores"),
        (lambda _: torch.tensor([0.0, float("nan"), 1.0]), "gave nan to answer 1 of its batch"),
        (lambda _: torch.tensor([0.0, 1.0, float("-inf")]), "gave -inf to answer 2 of its batch"),
    ],
)
def test_what_a_source_does_wrong_is_one_line_that_names_the_flag(score, line):
    with pytest.raises(InputError) as error:
        reward(score)(ROWS, responses())
    assert str(error.value) == f"--reward_source model: {line}"


def failing_on_rank_1(answers: Answers) -> torch.Tensor:
    from utils.parallel import distributed

    return failing(answers) if distributed.rank() == 1 else torch.zeros(len(answers))


def failure_of_this_rank() -> str:
    try:
        reward(failing_on_rank_1)(ROWS, responses())
    except InputError as error:
        return str(error)
    return ""


def test_an_exception_on_one_rank_ends_the_run_on_all():
    told = run_ranks(failure_of_this_rank, 2)
    assert told[0] == told[1] and "KeyError: 'no such unit'" in told[0]
