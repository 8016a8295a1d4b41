"""The losses of DPO are those of TRL's trainer, step by step, on real pairs; skipped where TRL is absent."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dpo_script import config, run_script
from tiny_models import save_causal_lm

from utils.data import Corpus, build_dataloader, build_datasets
from utils.output.metrics import read_metrics
from utils.parallel.launcher import environment_of_its_own

STEPS, BATCH = 30, 4


def python_with_trl() -> str:
    """An interpreter that imports TRL: that of TRL_PYTHON, or this one."""
    if path := os.environ.get("TRL_PYTHON"):
        return path
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed; set TRL_PYTHON to the python of an environment with trl 1.16")
    return sys.executable


@pytest.mark.slow
def test_losses_are_those_of_trl(llama_tokenizer, shared_data, tmp_path):
    python = python_with_trl()
    model = save_causal_lm(tmp_path / "model", llama_tokenizer, hidden_size=64, intermediate_size=128,
                           max_position_embeddings=1024)  # fmt: skip
    data = str(shared_data / "hh_rlhf_harmless_1800.jsonl")
    world = {"data": data, "model": str(model), "cache": str(tmp_path / "cache")}
    flags = config(
        world, tmp_path / "ours", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-4, beta=0.1,
        max_seq_len=256, lr_scheduler_type="constant", num_sample_generations=0, eval_samples=8,
    )  # fmt: skip
    run_script(flags)
    ours = [row["train/loss"] for row in read_metrics(tmp_path / "ours" / "metrics.jsonl") if "train/loss" in row]

    rows, _ = build_datasets(Corpus.of(flags), llama_tokenizer)
    loader = build_dataloader(rows, list, BATCH, shuffle=True, seed=flags.seed)
    loader.set_epoch(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    taken = [{name: row[name] for name in names} for _, batch in zip(range(STEPS), loader) for row in batch]
    setting = {"model": str(model), "rows": taken, "batch": BATCH, "learning_rate": 5e-4, "beta": 0.1}
    request, answer = tmp_path / "setting.json", tmp_path / "losses.json"
    request.write_text(json.dumps(setting | {"scratch": str(tmp_path / "scratch")}))
    script = Path(__file__).with_name("trl_losses.py")
    command = [python, str(script), str(request), str(answer)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=1200, env=environment_of_its_own())
    theirs = json.loads(answer.read_text())
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert min(theirs) < 0.68, "the comparison needs losses that move"
