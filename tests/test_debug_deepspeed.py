"""scripts/debug_deepspeed.py: one process or DeepSpeed's launcher, from any folder, with a debugger attached or not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from step_scripts import write_rows
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments import steps

REPOSITORY = Path(__file__).resolve().parents[1]
BOOTSTRAP = REPOSITORY / "scripts" / "debug_deepspeed.py"
_spec = importlib.util.spec_from_file_location("debug_deepspeed", BOOTSTRAP)
bootstrap = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bootstrap)
PROBE = """
import json, os, pathlib, sys
import utils.files
report = {"argv": sys.argv, "path0": sys.path[0], "rank": os.environ.get("RANK"), "cwd": os.getcwd(),
          "name": __name__, "PATH": os.environ["PATH"]}
folder = pathlib.Path(os.environ["REPORTS"])
(folder / f"{report['rank']}.json").write_text(json.dumps(report))
sys.exit(int(os.environ.get("PROBE_EXIT_CODE", "0")))
"""
# Stands in for PyCharm's debugger: notes who connected where.
FAKE_DEBUGGER = """
import os, pathlib
def settrace(host, port, suspend):
    (pathlib.Path(os.environ["REPORTS"]) / f"debugger-{os.environ.get('RANK')}").write_text(f"{host}:{port}:{suspend}")
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts here"
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE)
    return folder / "probe.py"


def debug(folder: Path, *argv: str, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess:
    """Run the bootstrap with `folder` as working directory; the probe's reports arrive in it as well."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, str(BOOTSTRAP), *argv],
        cwd=folder,
        env=clean | {"REPORTS": str(folder), "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def reports(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_one_process(probe, tmp_path):
    result = debug(tmp_path, "scripts here/probe.py", "--num_gpus", "5", "--flag")
    assert result.returncode == 0, result.stderr
    report = reports(tmp_path)["None"]
    assert report["argv"] == [str(probe), "--num_gpus", "5", "--flag"]  # flags after the script are the script's
    assert report["path0"] == str(probe.parent)
    assert (report["cwd"], report["name"]) == (str(tmp_path), "__main__")
    assert str(Path(sys.executable).parent) in report["PATH"].split(os.pathsep)


def test_exit_code_passes_through(probe, tmp_path):
    assert debug(tmp_path, str(probe), PROBE_EXIT_CODE="3").returncode == 3


def test_script_is_found_in_the_repository_from_anywhere(tmp_path):
    result = debug(tmp_path, "scripts/debug_deepspeed.py", "--help")
    assert result.returncode == 0 and "--num_gpus" in result.stdout


def test_launcher(probe, tmp_path):
    result = debug(tmp_path, "--num_gpus", "2", str(probe), "--flag")
    assert result.returncode == 0, result.stderr
    found = reports(tmp_path)
    assert sorted(found) == ["0", "1"]
    assert found["1"]["argv"] == [str(probe), "--local_rank=1", "--flag"]
    assert found["1"]["path0"] == str(probe.parent)


def test_launcher_passes_a_failure_on(probe, tmp_path):
    assert debug(tmp_path, "--num_gpus", "1", str(probe), PROBE_EXIT_CODE="3").returncode == 3


def test_debugger_connects_before_the_script(probe, tmp_path):
    (tmp_path / "pydevd_pycharm.py").write_text(FAKE_DEBUGGER)
    server = ["--debug_host", "10.0.0.1", "--debug_port", "9999"]
    result = debug(tmp_path, *server, str(probe), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "debugger-None").read_text() == "10.0.0.1:9999:False"


def test_debugger_connects_in_one_worker(probe, tmp_path):
    (tmp_path / "pydevd_pycharm.py").write_text(FAKE_DEBUGGER)
    arguments = ["--num_gpus", "2", "--debug_host", "10.0.0.1", "--debug_rank", "1", str(probe), "--flag"]
    result = debug(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("debugger-*")] == ["debugger-1"]
    assert reports(tmp_path)["1"]["argv"] == [str(probe), "--local_rank=1", "--flag"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere.py"], "error: no such script: nowhere.py (looked in "),
        (["elsewhere/step9_unknown/main.py"], "error: no such script: elsewhere/step9_unknown/main.py (looked in "),
        (["elsewhere/step1_finetuning/train.py"], "error: no such script: elsewhere/step1_finetuning/train.py"),
        (["--num_gpus", "0", str(BOOTSTRAP)], "error: --num_gpus 0: give 1 or more, or leave it out to run in "),
        (["--debug_host", "h", str(BOOTSTRAP)], "error: --debug_host needs PyCharm's debugger in this interpreter"),
    ],
)
def test_refusals(argv, line, tmp_path):
    result = debug(tmp_path, *argv)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    if "--debug_host" in argv:
        assert "pip install pydevd-pycharm" in result.stderr


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("step2_reward_model_finetuning", ["step2_reward_model_finetuning"]),
        ("step2_dpo_finetuning", ["step2_dpo_finetuning"]),
        ("step2_finetuning", ["step2_reward_model_finetuning", "step2_dpo_finetuning"]),
        ("step3_ppo", ["step3_rlhf_finetuning"]),
        ("step9_unknown", []),
    ],
)
def test_a_foreign_step_is_found_by_the_name_of_its_folder(folder, found, monkeypatch, capsys):
    """By the table of steps, whatever it holds: several may have the same number, and then the name decides."""
    folders = ["step1_supervised_finetuning", "step2_reward_model_finetuning", "step2_dpo_finetuning"]
    monkeypatch.setattr(steps, "CONFIGS", dict.fromkeys([*folders, "step3_rlhf_finetuning"]))
    if len(found) == 1:
        assert bootstrap._find(f"elsewhere/{folder}/main.py") == REPOSITORY / "training" / found[0] / "main.py"
        assert capsys.readouterr().err.endswith(f"running training/{found[0]}/main.py instead\n")
        return
    with pytest.raises(SystemExit):
        bootstrap._find(f"elsewhere/{folder}/main.py")
    advice = f"; training/ has {' and '.join(found)}: name one of them" if found else ""
    assert capsys.readouterr().err.endswith(f" and in {REPOSITORY}){advice}\n")


# alpaca-rlhf's argument lists, as its users paste them into PyCharm.
TRAINING_MODEL = "/tmp/pycharm_project_227/alpaca_rlhf/training_model"
ALPACA_RLHF = {
    "step1_supervised_finetuning": "--gradient_accumulation_steps 2 --lora_dim 128 --zero_stage 0 --deepspeed "
    "--output_dir OUT",
    "step2_reward_model_finetuning": "--num_padding_at_beginning 0 --gradient_accumulation_steps 2 --zero_stage 0 "
    "--deepspeed --output_dir OUT",
    "step3_rlhf_finetuning": "--actor_model_name_or_path A --critic_model_name_or_path C --actor_zero_stage 0 "
    "--critic_zero_stage 0 --num_padding_at_beginning 0 --gradient_accumulation_steps 2 --deepspeed "
    "--actor_lora_dim 128 --enable_hybrid_engine --actor_gradient_checkpointing --output_dir OUT",
}


def alpaca_rlhf(step: str) -> list[str]:
    return ["--num_gpus", "1", f"{TRAINING_MODEL}/{step}/main.py", *ALPACA_RLHF[step].split()]


def mapped(step: str) -> str:
    return f"{TRAINING_MODEL}/{step}/main.py does not exist here; running training/{step}/main.py instead"


@pytest.mark.parametrize("step", ["step1_supervised_finetuning", "step2_reward_model_finetuning"])
def test_alpaca_rlhfs_steps_without_a_model_get_one_line(step, tmp_path):
    result = debug(tmp_path, *alpaca_rlhf(step))
    assert result.returncode == 2 and result.stdout == ""
    line = "error: --model_name_or_path is required: folder or hub name of the model to start from"
    assert result.stderr.splitlines() == [mapped(step), line]
    assert not list(tmp_path.iterdir())


def test_alpaca_rlhfs_step_3_runs(tmp_path, tiny_tokenizer):
    """With models A and C, and the default data set, in the working directory."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    save_causal_lm(tmp_path / "A", tiny_tokenizer, **sizes)
    save_reward_model(tmp_path / "C", tiny_tokenizer, **sizes)
    (tmp_path / "Dahoas" / "rm-static").mkdir(parents=True)
    rows = [
        {"prompt": f" Human: name number {n} . Assistant:", "chosen": " one .", "rejected": " no ."} for n in range(100)
    ]
    write_rows(tmp_path / "Dahoas" / "rm-static" / "train.jsonl", rows)
    result = debug(tmp_path, *alpaca_rlhf("step3_rlhf_finetuning"), timeout=300)
    assert result.returncode == 0, result.stderr
    assert mapped("step3_rlhf_finetuning") in result.stderr.splitlines()
    assert (tmp_path / "OUT" / "actor" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "OUT" / "summary.json").read_text())["iterations"] == 1
