"""--keep_best: the model of the best evaluation, not of the last one."""

import json

import pytest
import transformers
from step_scripts import flags, load_step, run_step

from utils.checkpoints import RunState
from utils.metrics import read_metrics


def evaluations(folder, key: str) -> list[float]:
    """Of a run: those during and after training."""
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row and row["step"] > 0]


def test_step1_keeps_the_lowest_perplexity(world, tmp_path):
    changes = {"eval_interval": 1, "num_sample_generations": 0, "learning_rate": 1.0, "max_steps": 8}
    run_step(1, flags(world, 1, tmp_path, keep_best=True, num_warmup_steps=50, **changes))  # too fast in the end
    losses = evaluations(tmp_path, "eval/loss")
    assert min(losses) < losses[-1]
    best = tmp_path / "best"
    transformers.AutoTokenizer.from_pretrained(best)
    again = run_step(1, flags(world, 1, model_name_or_path=best, max_steps=1, num_sample_generations=0))
    assert again["eval/loss_before"] == pytest.approx(min(losses), abs=1e-5)


def test_step2_keeps_the_highest_accuracy_with_its_own_scale(world, tmp_path):
    argv = flags(world, 2, tmp_path, keep_best=True, eval_interval=1, eval_iters=1, max_steps=6)
    run_step(2, argv)
    accuracies = evaluations(tmp_path, "eval/accuracy")
    first_best = accuracies.index(max(accuracies))
    assert first_best < len(accuracies) - 1
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert config["score_mean"] == pytest.approx(evaluations(tmp_path, "eval/chosen_mean")[first_best])
    assert config["score_mean"] != json.loads((tmp_path / "config.json").read_text())["score_mean"]


def test_step3_keeps_the_highest_score(world, tmp_path, monkeypatch):
    scores = iter([0.0, 0.5, 2.0, 1.0])  # before, after the first and the second rollout, at the end
    monkeypatch.setattr(load_step(3), "evaluate_prompts", lambda *_: {"eval/score_mean": next(scores)})
    saved = []
    monkeypatch.setattr(
        load_step(3).RlhfEngine, "save", lambda self, folder: saved.append((self.actor.global_steps, str(folder)))
    )
    run_step(3, flags(world, 3, tmp_path, keep_best=True, eval_interval=1, max_steps=3))
    best = str(tmp_path / "best")
    steps = [step for step, folder in saved if folder == best]
    assert steps == [2, 4]  # two optimiser steps in each rollout


def test_a_score_that_is_no_number_is_never_the_best():
    state = RunState()
    assert [state.improves(score) for score in (float("nan"), 1.0, float("inf"), 2.0)] == [False, True, False, True]
