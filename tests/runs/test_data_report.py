"""Every step writes `data_report.json` into its output folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from step_scripts import flags, run_step

from utils.arguments import parse_config


def run_dpo(argv: list[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "training" / "step2_dpo_finetuning" / "main.py"
    spec = importlib.util.spec_from_file_location("dpo_main_of_reports", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(parse_config(module.Config, argv))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stream_reports_what_is_known_of_it(world, tmp_path, step, capsys):
    changes = {"max_steps": 1, "streaming": True, "max_row_tokens": 250, "data_split": "1,1,1"}
    changes |= {"num_sample_generations": 0} if step == 1 else {}
    run_step(step, flags(world, step, tmp_path, **changes))
    report = json.loads((tmp_path / "data_report.json").read_text())
    (source,) = report["sources"]
    assert report["training_rows"] is None and source["rows"] is None and report["held_out_rows"] > 0
    assert source["share_of_this_step"] == pytest.approx(1 / 3) and report["filters"] == {"max_row_tokens": 250}
    assert report["summary"][0] in capsys.readouterr().out and "audit: " in report["summary"][-1]


@pytest.mark.parametrize("step", ["1", "2", "dpo", "3"])
def test_each_step_reports_its_data(world, tmp_path, step, capsys):
    changes = {"max_steps": 1, "deduplicate": "exact", "max_row_tokens": 250}
    if step == "3":
        changes["unsupervised_dataset_name"] = world["data"]
    else:
        changes |= {"num_warmup_steps": 0, "min_response_tokens": 2}
    if step in ("1", "dpo"):
        changes["num_sample_generations"] = 0
    number = 2 if step == "dpo" else int(step)
    argv = flags(world, number, tmp_path, **changes)
    run_dpo(argv) if step == "dpo" else run_step(number, argv)
    report = json.loads((tmp_path / "data_report.json").read_text())
    (source,) = report["sources"]
    assert source["rows"] == 60 and source["held_out"] + sum(source["divided"].values()) == 60
    assert source["this_step"] == source["divided"][f"step {number}"] == report["training_rows"]
    assert report["purpose"] == {"1": "sft", "2": "preference", "dpo": "preference", "3": "prompts"}[step]
    assert report["filters"]["deduplicate"] == "exact" and report["tokens"]["training"]["prompt"]["p50"] > 5
    assert report["summary"][0] in capsys.readouterr().out
    assert ("texts" in report) == (step == "3")
    if step == "3":
        assert report["texts"]["filters"] == {"deduplicate": "exact"} and report["texts"]["sources"][0]["rows"] == 60
