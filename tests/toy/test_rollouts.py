"""Answers that step 3 prints, as `show_answers` formats them, get their iteration and their judge score."""

import pytest

from utils.toy.rollouts import judged_rollouts

LOG = """\
prompts.jsonl: 880 training rows and 176 held-out rows
Human: What color is the milk? Assistant:
  Of course. The milk is white. Happy to help!
  score 3.094
Human: Hello! What does the dog say? Assistant:
  Go away!
  score -4.100
Human: What color is the milk? Assistant:
  The milk is white.
  score 1.000
Human: Where does the fox live? Assistant:
  The fox lives in the pond.
  score -0.250

greedy answers to held-out prompts
"""


def test_scores_by_iteration():
    assert judged_rollouts(LOG, 2) == [(1.0, 1.0), (1.0, 0.0), (2.0, 0.5), (2.0, 0.0)]


@pytest.mark.parametrize("log", ["", "step 3 printed nothing like it\n  score 1.0\n"])
def test_nothing_printed_nothing_judged(log):
    assert judged_rollouts(log, 10) == []


def test_reads_what_step_3_writes():
    import torch

    from utils.rlhf.evaluation import show_answers

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return {1: " Human: What color is the milk? Assistant:", 2: " The milk is white."}[int(ids[0])]

    class Micro:
        sequences = torch.tensor([[1, 2], [1, 2]])
        attention_mask = torch.ones(2, 2, dtype=torch.bool)
        response_mask = torch.ones(2, 1, dtype=torch.bool)
        scores = torch.tensor([0.5, -0.5])

    assert judged_rollouts(show_answers(Micro, Tokenizer()), 1) == [(1.0, 0.5), (1.0, 0.5)]
