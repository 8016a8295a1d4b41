import pytest

from utils.toy.evaluation import Answer
from utils.toy.judge import Verdict
from utils.toy.report import KINDS, Examination


@pytest.fixture
def make_examination():
    """An examination whose answers have the given judge scores."""

    def make(name: str, greedy: list[float], sampled: list[float]) -> Examination:
        def answers(scores):
            return [
                Answer(
                    f"question {number}?", f"{name} {number}", Verdict(score, KINDS[number % 7]), score - 1, 0.5, True
                )
                for number, score in enumerate(scores)
            ]

        return Examination(name, 2.0, answers(greedy), answers(sampled))

    return make
