"""--keep_best: the model of the best evaluation, not of the last one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from step_scripts import flags, load_step, run_step

from utils.output.metrics import read_metrics
from utils.rlhf.roles import Roles
from utils.runs.best import save_if_best


def evaluations(folder, key: str) -> list[float]:
    """The evaluations of a run during and after training."""
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row and row["step"] > 0]


def make_folder(folder: str | Path) -> str:
    """Stands in for saving a model: makes the folder, in which the score is then written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return str(folder)


def test_step1_keeps_the_lowest_perplexity(world, tmp_path):
    changes = {"eval_interval": 1, "num_sample_generations": 0, "learning_rate": 1.0, "max_steps": 8}
    run_step(1, flags(world, 1, tmp_path, keep_best=True, num_warmup_steps=50, **changes))  # too high a rate in the end
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
        Roles, "save", lambda self, folder: saved.append((self.actor.engine.global_steps, make_folder(folder)))
    )
    run_step(3, flags(world, 3, tmp_path, keep_best=True, eval_interval=1, max_steps=3))
    best = str(tmp_path / "best")
    steps = [step for step, folder in saved if folder == best]
    assert steps == [2, 4]  # two optimiser steps in each rollout


def test_a_run_that_goes_on_after_its_end_does_not_forget_its_last_evaluation(world, tmp_path, monkeypatch):
    """Which came after its last checkpoint. Not even a resumed run may overwrite a better model."""
    losses = iter([5.0, 2.0, 1.8, 1.9, 1.85])  # before; after steps 1 and 2; in the longer run after steps 3 and 4
    monkeypatch.setattr(load_step(1), "evaluate", lambda *_: {"eval/loss": next(losses), "eval/perplexity": 1.0})
    changes = {"keep_best": True, "eval_interval": 1, "save_interval": 1, "num_sample_generations": 0}
    run_step(1, flags(world, 1, tmp_path, max_steps=2, **changes))
    weights = (tmp_path / "model.safetensors").read_bytes()
    run_step(1, flags(world, 1, tmp_path, max_steps=4, resume_from_checkpoint="auto", **changes))
    assert (tmp_path / "model.safetensors").read_bytes() != weights
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "best" / "score.json").read_text()) == {"score": -1.8}


def test_another_run_in_the_same_folder_has_a_best_model_of_its_own(world, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 5.0, 2.0])
    monkeypatch.setattr(load_step(1), "evaluate", lambda *_: {"eval/loss": next(losses), "eval/perplexity": 1.0})
    for seed in (1, 2):
        run_step(1, flags(world, 1, tmp_path, max_steps=1, keep_best=True, seed=seed, num_sample_generations=0))
    assert (tmp_path / "best/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    config = SimpleNamespace(keep_best=True, output_dir=str(tmp_path))

    def is_best(score: float) -> bool:
        saved = []
        save_if_best(config, score, lambda folder: saved.append(make_folder(folder)))
        return bool(saved)

    assert not is_best(float("nan")) and not is_best(float("inf"))
    assert is_best(-3.0)
    assert not is_best(float("nan")) and not is_best(-3.0)
    assert is_best(-2.5)
    config.keep_best = False
    assert not is_best(7.0)
