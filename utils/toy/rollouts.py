"""Judge scores of PPO's own samples, taken from the answers that step 3 prints while it trains."""

import re

from utils.toy.judge import judge

# The format of `--print_answers`: the prompt, the response, the reward model's score.
_ANSWER = re.compile(r"^Human: (?P<question>.*) Assistant:\n  (?P<answer>.*)\n  score -?\d", re.MULTILINE)


def judged_rollouts(log: str, iterations: int) -> list[tuple[float, float]]:
    """(iteration, judge score) of every answer printed in `log` by a run of `iterations` iterations.

    Step 3 prints equally many answers in each iteration. Answers that contain a newline are not recognised.
    """
    found = [(match["question"], match["answer"]) for match in _ANSWER.finditer(log)]
    share = iterations / max(len(found), 1)
    return [
        (float(1 + int(index * share)), judge(question, answer).score) for index, (question, answer) in enumerate(found)
    ]
