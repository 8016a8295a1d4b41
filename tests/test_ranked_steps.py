"""Step 2 and direct preference optimisation on ranked and scored answers: what they learn, and the weights of pairs."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_ranks
from safetensors.torch import load_file
from step_scripts import config_of, flags, load_step, run_step, step_config, write_rows

from utils.arguments import run
from utils.data import Corpus, build_dataloader, build_datasets
from utils.models.loading import load_scalar_model
from utils.output.metrics import read_metrics
from utils.parallel.zero import zero_config

STEPS = (2, "dpo")
ANSWERS = (" it is red . happy to help .", " it is red .", " who knows ?", " go away !")
COMMON = {"data_split": "0,1,0", "max_steps": 3, "lr_scheduler_type": "constant", "num_warmup_steps": 0}


def ranked_file(folder: Path, count: int = 16) -> str:
    """Prompts with two to four answers, so one to six pairs; politeness decides."""
    rows = []
    for index in range(count):
        some = ANSWERS[-2 - index % 3 :]
        prompt = f" Human: what colour is thing {index} ? Assistant:"
        rows.append(
            {"prompt": prompt, "responses": [*some], "scores": [len(some) - place for place in range(len(some))]}
        )
    return write_rows(folder / "ranked.jsonl", rows)


def changes_for(step, **changes) -> dict:
    samples = {"num_sample_generations": 0} if step == "dpo" else {}
    return COMMON | samples | {"pairs": "all", "per_device_train_batch_size": 2} | changes


def losses_of(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("step", STEPS)
def test_it_learns_from_ranked_answers_and_from_scored_ones(world, tmp_path, step):
    scored = [
        {"prompt": f"what colour is thing {i} ?", "response": answer, "kind": 4 - place, "clear": 2 - place % 2}
        for place, answer in enumerate(ANSWERS)
        for i in range(12)
    ]
    scored = write_rows(tmp_path / "scored.jsonl", scored)
    for name, changes in {
        "ranked": {"data_path": [ranked_file(tmp_path)]},
        "scored": {"data_path": [scored], "score_column": ["kind:0.5", "clear:0.1"]},
    }.items():
        summary = run_step(step, flags(world, step, tmp_path / name, **changes_for(step, **changes, max_steps=12)))
        assert summary["eval/accuracy"] > 0.9 and summary["eval/loss"] < summary["eval/loss_before"] - 0.1, name


def test_the_losses_of_step_2_are_those_of_equation_1(world, tmp_path, tiny_tokenizer):
    """The mean over prompts of the mean over each one's pairs, computed pair by pair."""
    data = ranked_file(tmp_path)
    changes = changes_for(2, data_path=[data], per_device_train_batch_size=4, max_steps=1, learning_rate=1e-9)
    run_step(2, flags(world, 2, tmp_path / "out", **changes))
    config = step_config(world, 2, **changes)
    rows, held_out = build_datasets(Corpus.of(config), transformers.AutoTokenizer.from_pretrained(world["model"]))
    loader = build_dataloader(rows, list, 4, shuffle=True, seed=config.seed, groups=rows.groups)
    model = load_scalar_model(str(tmp_path / "out"), tiny_tokenizer, zero_config(0, "fp32"), dtype="fp32").eval()

    def loss(row: dict) -> float:
        scores = []
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            scores.append(model(ids, torch.ones_like(ids))[0, -1].item())
        return math.log1p(math.exp(scores[1] - scores[0]))

    def equation_1(some) -> float:
        by_prompt: dict[int, list[float]] = {}
        for row in some:
            by_prompt.setdefault(row["group"], []).append(loss(row))
        return sum(sum(losses) / len(losses) for losses in by_prompt.values()) / len(by_prompt)

    with torch.no_grad():
        batch = next(iter(loader))
        assert len({row["group"] for row in batch}) == 4 and len(batch) > 4
        assert losses_of(tmp_path / "out") == pytest.approx([equation_1(batch)], abs=1e-5)
        before = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]["eval/loss"]
        assert before == pytest.approx(equation_1(list(held_out)), abs=1e-5)


def curves_of(world, data: str, folder: str, processes: int, tokens: int) -> dict[str, list[float]]:
    """Losses, then those of held-out rows, of each step; micro-batches of at most so many tokens, 0 for rows."""
    curves = {}
    for step in STEPS:
        output = Path(folder) / f"{processes} {step}"
        changes = {"per_device_train_batch_size": 4 // processes, "max_tokens_per_batch": tokens, "max_seq_len": 64}
        run_step(step, flags(world, step, output, **changes_for(step, data_path=[data], **changes)))
        curves[str(step)] = [*losses_of(output), read_metrics(output / "metrics.jsonl")[-1]["eval/loss"]]
    return curves


def test_two_processes_and_micro_batches_by_tokens_change_nothing(world, tmp_path):
    data = ranked_file(tmp_path)
    one = curves_of(world, data, str(tmp_path), 1, 0)
    two = run_ranks(curves_of, 2, world, data, str(tmp_path), 2, 160)[0]
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=2e-5), step
        assert len(set(one[step])) == 4


@pytest.mark.parametrize("step", STEPS)
def test_a_run_on_ranked_answers_resumes_as_if_it_had_not_stopped(world, tmp_path, capsys, step):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    common = changes_for(step, data_path=[ranked_file(tmp_path)], max_steps=0, num_train_epochs=1)
    run_step(step, flags(world, step, whole, **common))
    steps = len(losses_of(whole))
    assert "8 optimiser steps of 2 prompts (1 x 2 x 1), pairs of up to 128 tokens" in capsys.readouterr().out
    assert steps == 8  # 15 of 16 prompts train, two in each step
    run_step(step, flags(world, step, stopped, save_interval=3, **common | {"max_steps": 3}))
    run_step(step, flags(world, step, stopped, resume_from_checkpoint="auto", **common))
    assert losses_of(stopped) == losses_of(whole)
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, load_file(stopped / "model.safetensors")[name]), name


def test_kto_takes_its_labels_from_scores(world, tmp_path):
    rows = [
        {"prompt": f"what colour is thing {i} ?", "completion": ANSWERS[place], "quality": 4 - place}
        for place in (0, 3)
        for i in range(16)
    ]
    changes = {"loss": ["kto"], "score_column": ["quality"], "score_threshold": 2.5, "pairs": "best_worst"}
    changes |= {"data_path": [write_rows(tmp_path / "scored.jsonl", rows)], "per_device_train_batch_size": 8}
    summary = run_step("dpo", flags(world, "dpo", tmp_path / "out", **changes_for("dpo", **changes, max_steps=8)))
    assert summary["eval/margin"] > 1


def test_a_dry_run_counts_prompts(world, tmp_path, capsys):
    changes = changes_for(2, data_path=[ranked_file(tmp_path)], max_steps=0)
    numbers = run_step(2, [*flags(world, 2, **changes), "--dry_run"])
    assert numbers["optimiser_steps"] == 8
    assert "optimiser steps: 8, on 15 training prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (2, {"score_column": ["a:b"]}, "--score_column 'a:b': give a column, or a column and its weight"),
        (2, {"score_column": ["a:0"]}, "--score_column 'a:0': give a column"),
        (2, {"score_column": [":1"]}, "--score_column ':1': give a column"),
        (2, {"score_column": ["a", "a:2"]}, "--score_column a is given twice"),
        (2, {"score_column": ["a"], "margin_column": "m"}, "--margin_column is for rows that hold a pair"),
        (2, {"pairs": "all", "data_path": ["x:0.5", "y:0.5"]}, "--pairs all keeps the pairs of a prompt together"),
        ("dpo", {"loss": ["kto"], "pairs": "all"}, "--pairs all makes pairs of answers, and --loss kto reads single"),
        ("dpo", {"loss": ["kto"], "score_column": ["a"]}, "add --score_threshold, or leave out --score_column"),
        ("dpo", {"loss": ["kto"], "score_threshold": 1.0}, "add --score_column, or leave out --score_threshold"),
        ("dpo", {"score_column": ["a"], "score_threshold": 1.0}, "--score_threshold is for --loss kto"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(world, capsys, step, changes, message):
    with pytest.raises(SystemExit) as stop:
        run(load_step(step).main, config_of(step), flags(world, step, **changes))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_one_answer_without_the_flag_name_it(world, tmp_path, capsys):
    rows = write_rows(
        tmp_path / "scored.jsonl", [{"prompt": f"a {i}", "response": "b", "quality": 1} for i in range(4)]
    )
    for step, changes in ((2, {}), ("dpo", {})):
        with pytest.raises(SystemExit):
            run(load_step(step).main, config_of(step), flags(world, step, data_path=[rows], **changes))
        assert "--score_column" in capsys.readouterr().err
