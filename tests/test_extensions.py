"""docs/architecture.md shows how to add things: its examples are added to a copy of the project, and work there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from step_scripts import REPOSITORY, write_rows
from tiny_models import save_reward_model

from utils.parallel.launcher import environment_of_its_own

PAGE = REPOSITORY / "docs" / "architecture.md"
EXAMPLES = {  # what each adds, by its heading, and how many files it may touch
    "A loss of the reward model": 2,
    "An advantage estimator": 2,
    "A source of rewards": 2,
    "A data format": 2,
    "An architecture for the decode engine": 1,
    "A model": 1,
}
STEP2 = """
    --reward_loss hinge --model_name_or_path actor --data_path quiz.jsonl --data_split 0,1,0 --output_dir reward
    --max_steps 2 --per_device_train_batch_size 4 --max_seq_len 64 --dtype fp32 --data_output_path cache
"""
STEP3 = """
    --advantage_estimator group_baseline --reward_source brevity --actor_model_name_or_path actor
    --critic_model_name_or_path critic --data_path quiz.jsonl --data_split 0,0,1 --output_dir ppo --max_steps 1
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 --max_prompt_seq_len 32
    --max_answer_seq_len 8 --dtype fp32 --eval_prompts 4 --data_output_path cache
"""


def blocks() -> list[tuple[str, str, str]]:
    """(heading, title, content) of each code block of the page that has a title."""
    found = []
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for title, content in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', section, re.DOTALL | re.MULTILINE):
            found.append((heading, title, content))
    return found


def add(project: Path, title: str, content: str) -> str:
    """Add an example to the project; the path of the file that it touches."""
    name, _, place = title.partition(", ")
    path = project / name
    if not place:
        assert not path.exists(), f"{name} is to be a new file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return name
    text = path.read_text(encoding="utf-8")
    if place == "an import":
        last = list(re.finditer(r"^from utils\.[^\n]*\n", text, flags=re.MULTILINE))[-1]
        text = text[: last.end()] + content + text[last.end() :]
    else:
        table = re.search(rf"^{place.removeprefix('a row of ')} = [{{(][^\n]*\n", text, flags=re.MULTILINE)
        assert table, f"{name} has no table for {place}"
        text = text[: table.end()] + content + text[table.end() :]
    path.write_text(text, encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict[str, set[str]]]:
    """A copy of the code with all examples, and the files that each has touched."""
    folder, touched = tmp_path_factory.mktemp("project"), {}
    for name in ("utils", "training", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    for heading, title, content in blocks():
        touched.setdefault(heading, set()).add(add(folder, title, content))
    return folder, touched


def test_each_example_touches_few_files(project):
    _, touched = project
    assert {heading: len(names) for heading, names in touched.items()} == EXAMPLES


def run(project: Path, folder: Path, script: str, words: str) -> str:
    """Run a step of the copy in `folder`; what it printed."""
    result = subprocess.run(
        [sys.executable, str(project / "training" / script / "main.py"), *words.split()],
        cwd=folder,
        env=environment_of_its_own() | {"PYTHONPATH": str(project), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """Data in the new format, a Mistral to train, and a critic."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"Thing {i} ?", "better": "one two three", "worse": f"no {i}"} for i in range(40)]
    write_rows(folder / "quiz.jsonl", rows)
    config = transformers.MistralConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "actor")
    tiny_tokenizer.save_pretrained(folder / "actor")
    save_reward_model(folder / "critic", tiny_tokenizer)
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_step_2_trains_on_the_new_format_with_the_new_loss(project, folder):
    run(project[0], folder, "step2_reward_model_finetuning", STEP2)
    rows = [row for row in metrics(folder / "reward") if "train/loss" in row]
    assert len(rows) == 2
    for row in rows:  # no pair's scores differ by 1 yet
        assert row["train/loss"] == pytest.approx(1 - row["train/margin"], abs=1e-4)


def test_step_3_learns_without_a_critic_from_the_new_reward_with_the_decode_engine(project, folder):
    printed = run(project[0], folder, "step3_rlhf_finetuning", STEP3)
    assert "no fast path" not in printed and "transformers generates" not in printed
    (row,) = [row for row in metrics(folder / "ppo") if "ppo/score_mean" in row]
    assert -8 <= row["ppo/score_mean"] <= 0 and "ppo/value_loss" not in row and "ppo/explained_variance" not in row
    assert row["ppo/sampling_logprob_difference_max"] < 1e-3, "of the decode engine and the training forward"
    assert not (folder / "ppo" / "critic").exists() and (folder / "ppo" / "actor").is_dir()


def test_the_new_choices_are_described_by_help(project, folder):
    help_of_step_3 = run(project[0], folder, "step3_rlhf_finetuning", "--help")
    assert "group_baseline: rewards less the mean" in " ".join(help_of_step_3.split())


def test_the_new_preset_is_found(project):
    script = project[0] / "scripts" / "train.sh"
    told = subprocess.run(["bash", str(script), "none", "step1"], capture_output=True, text=True, timeout=30)
    assert told.returncode == 2 and "tinyllama/" in told.stderr
