"""The shell scripts and PyCharm's run configurations: they parse, they start what they say, and their flags exist."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from step_scripts import REPOSITORY, STEPS, load_step

from utils.arguments import parse_config, refuse_unavailable, remarks

SHELL_SCRIPTS = sorted([*(REPOSITORY / "scripts").rglob("*.sh"), REPOSITORY / ".ci" / "run"])
MODEL_SCRIPTS = sorted(path for step in STEPS for path in (REPOSITORY / "scripts").glob(f"*/{step}.sh"))
RUN_CONFIGURATIONS = sorted((REPOSITORY / ".run").glob("*.run.xml"))
# Stands in for DeepSpeed's launcher and for Python: writes down how it was called.
RECORDER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd()}) + "\\n")
print("recorded")
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts alone, so that what they create stays out of the real checkout."""
    folder = tmp_path / "check out"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    for script in STEPS.values():
        (folder / script.relative_to(REPOSITORY)).parent.mkdir(parents=True)
        shutil.copy(script, folder / script.relative_to(REPOSITORY))
    (folder / "utils").symlink_to(REPOSITORY / "utils")
    executable(tmp_path / "bin" / "deepspeed", RECORDER)
    executable(tmp_path / "bin" / "python", f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    return folder


def bash(script: Path, *argv: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Run a script of `checkout` from another folder; also return the recorded calls."""
    root = script.parents[2] if script.parent.name != "scripts" else script.parents[1]
    calls = root.parent / "calls.jsonl"
    path = f"{root.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(script), *argv],
        cwd=root.parent,
        env=os.environ | {"PATH": path, "CALLS": str(calls)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    recorded = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return result, recorded


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=by_name)
def test_shell_syntax_and_strictness(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert '"$@"' in text or script.name == "setup_environment.sh"
    assert os.access(script, os.X_OK)
    for forbidden in ("http://", "https://", "pkill", "killall", "sudo ", "rm -rf /"):
        assert forbidden not in text


def test_every_model_has_the_steps_of_the_chain():
    folders = {script.parent for script in MODEL_SCRIPTS}
    names = {folder.name for folder in folders}
    assert {"llama2-7b", "llama2-7b-lora", "llama2-13b", "llama2-70b", "opt-1.3b"} <= names
    assert {"opt-350m", "gpt2", "phi-1_5"} <= names
    steps = {folder.name: {script.stem for script in MODEL_SCRIPTS if script.parent == folder} for folder in folders}
    assert all({"step1", "step2", "step3"} <= scripts for scripts in steps.values())
    presets = {(path.parent.name, path.stem) for path in (REPOSITORY / "scripts" / "configs").glob("*/*.yaml")}
    assert presets == {(model, step) for model, scripts in steps.items() for step in scripts}
    # All start through train.sh: tests/checkpoints/test_stopping.py shows that its output survives a signal.
    assert all("/../train.sh" in script.read_text(encoding="utf-8").splitlines()[-1] for script in MODEL_SCRIPTS)


@pytest.mark.parametrize("script", MODEL_SCRIPTS, ids=by_name)
def test_model_scripts(script, checkout, monkeypatch):
    """Flags of the launcher and of the step parse, change something, are available, and further flags win."""
    from deepspeed.launcher.runner import parse_args

    copy = checkout / script.relative_to(REPOSITORY)
    result, calls = bash(copy, "--seed", "7", "--data_path", "a b.json", HOSTFILE="/etc/hosts list")
    assert result.returncode == 0, result.stderr
    launch = parse_args(calls[0]["argv"])
    step = script.stem
    assert calls[0]["cwd"] == str(checkout)
    assert REPOSITORY / launch.user_script == STEPS[step]
    if "70b" in script.parent.name:
        assert launch.hostfile == "/etc/hosts list"
    monkeypatch.chdir(checkout)
    config = parse_config(load_step(step).Config, launch.user_args)
    refuse_unavailable(config)
    assert remarks(config) == []
    assert (config.seed, config.data_path) == (7, ["a b.json"])
    assert config.output_dir == f"output/{script.parent.name}/{step}"
    if step == "step3":
        assert config.actor_model_name_or_path == f"output/{script.parent.name}/step1"
        assert config.critic_model_name_or_path == f"output/{script.parent.name}/step2"
    assert (checkout / f"{config.output_dir}.log").read_text() == "recorded\n"


def test_model_scripts_pass_failures_on(checkout):
    assert bash(checkout / "scripts" / "opt-1.3b" / "step1.sh", EXIT_CODE="3")[0].returncode == 3
    result, calls = bash(checkout / "scripts" / "llama2-70b" / "step1.sh", HOSTFILE="")
    assert result.returncode != 0 and "HOSTFILE" in result.stderr and len(calls) == 1


def test_a_model_is_one_file_for_each_of_its_steps(checkout, monkeypatch):
    """The file of the model overrides what all models share, and the command line overrides both."""
    preset = checkout / "scripts" / "configs" / "my-model" / "step1.yaml"
    preset.parent.mkdir()
    preset.write_text("model_name_or_path: models/mine\nlora_dim: 8\nmax_seq_len: 99\n")
    result, calls = bash(checkout / "scripts" / "train.sh", "--num_gpus", "2", "my-model", "step1", "--seed", "7")
    assert result.returncode == 0, result.stderr
    assert calls[0]["argv"][:3] == ["--num_gpus", "2", "training/step1_supervised_finetuning/main.py"]
    monkeypatch.chdir(checkout)
    config = parse_config(load_step(1).Config, calls[0]["argv"][3:])
    assert (config.model_name_or_path, config.lora_dim, config.max_seq_len, config.seed) == ("models/mine", 8, 99, 7)
    assert config.learning_rate == 1e-5 and config.output_dir == "output/my-model/step1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a model and a step"),
        (["gpt2"], "give a model and a step"),
        (["no-such-model", "step1"], "there is no preset scripts/configs/no-such-model/step1.yaml"),
        (["gpt2", "step9"], "there is no step step9; steps: step1 step2"),
        (["--num_gpus"], "--num_gpus needs a value"),
    ],
)
def test_what_train_refuses(checkout, argv, message):
    result, calls = bash(checkout / "scripts" / "train.sh", *argv)
    assert result.returncode == 2 and calls == []
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", RUN_CONFIGURATIONS, ids=by_name)
def test_run_configurations(path):
    options = {option.get("name"): option.get("value") for option in ElementTree.parse(path).getroot().iter("option")}
    assert options["SCRIPT_NAME"] == "$PROJECT_DIR$/scripts/debug_deepspeed.py"
    assert options["WORKING_DIRECTORY"] == "$PROJECT_DIR$"
    argv = shlex.split(options["PARAMETERS"])
    main = next(position for position, token in enumerate(argv) if token.endswith("main.py"))
    step = next(name for name, script in STEPS.items() if script == REPOSITORY / argv[main])
    config = parse_config(load_step(step).Config, argv[main + 1 :])
    refuse_unavailable(config)
    assert config.output_dir == f"output/debug/{step}"


# --- setting up, with a stand-in for pip -----------------------------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
# A Python that makes environments of itself and notes what pip is asked for.
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv" >>"$CALLS"
elif [ "$1 $2" = "-m pip" ]; then
  shift 2; echo "pip $*" >>"$CALLS"; exit "${PIP_EXIT_CODE:-0}"
elif [ "$1" = "--version" ]; then
  echo "Python 3.11.0"
elif [ "$1" = "-c" ] && [[ $2 == *torch.version* ]]; then
  exit "${TORCH_HAS_CUDA:-1}"
elif [ "$1" = "-c" ]; then
  exit 0
else
  echo "python $*" >>"$CALLS"
fi
"""


class Setup:
    """A checkout in which `setup_environment.sh` runs with stand-ins for Python, pip and nvidia-smi."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.calls = checkout.parent / "calls.txt"
        for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, checkout / name)
        executable(checkout.parent / "bin" / "fake-python", FAKE_PYTHON)
        self.gpus("")

    def gpus(self, listed: str) -> None:
        executable(self.checkout.parent / "bin" / "nvidia-smi", f"#!/usr/bin/env bash\necho '{listed}'\n")

    def run(self, *argv: str, script: str = "setup_environment.sh", **environment: str) -> tuple[int, str, list[str]]:
        """Exit code, output and new calls of pip and Python."""
        self.calls.write_text("")
        path = f"{self.checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
        settings = {"PATH": path, "CALLS": str(self.calls), "PYTHON": "fake-python", "TORCH_INDEX_URL": ""}
        result = subprocess.run(
            ["bash", str(self.checkout / "scripts" / script), *argv],
            cwd=self.checkout.parent,
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout + result.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def setup(checkout: Path) -> Setup:
    return Setup(checkout)


def test_setup_installs_once(setup):
    code, output, calls = setup.run()
    assert code == 0, output
    assert calls[0] == "venv"
    assert [call.split("install")[1].split()[-1] for call in calls[1:]] == ["torch==2.13.0", "requirements.txt"]
    assert "creating .venv" in output and "torch for CPUs" in output
    assert setup.run() == (0, "setup: .venv has everything in requirements.txt\n", [])


def test_setup_notices_changed_requirements(setup):
    setup.run()
    pins = setup.checkout / "pyproject.toml"
    pins.write_text(pins.read_text().replace("numpy==", "numpy==1"))
    assert len(setup.run()[2]) == 2
    assert setup.run()[2] == []


def test_development_requirements_include_the_others(setup):
    assert len(setup.run("requirements-dev.txt")[2]) == 3
    assert setup.run("requirements.txt")[2] == []
    assert setup.run("requirements-dev.txt")[2] == []


def test_setup_after_an_interrupted_installation(setup):
    assert setup.run(PIP_EXIT_CODE="1")[0] == 1
    code, _, calls = setup.run()
    assert code == 0 and len(calls) == 2  # .venv stands, both installations are repeated


def test_setup_takes_torch_from_the_cpu_index_only_without_gpus(setup):
    index = {"TORCH_INDEX_URL": "file:///wheels"}
    assert "--no-deps --index-url file:///wheels torch==2.13.0" in setup.run(**index)[2][1]
    setup.gpus("GPU 0: NVIDIA H200")
    code, output, calls = setup.run(**index)  # a GPU has appeared: install again
    assert code == 0 and "torch with CUDA" in output
    assert not any("index-url" in call for call in calls)


def test_torch_for_cpus_does_not_stay_where_a_gpu_appears(setup):
    """It satisfies the pin, so that pip would keep it, and every run would be on the CPU."""
    setup.run()
    setup.gpus("GPU 0: NVIDIA H200")
    for has_cuda, options in (("0", ["--force-reinstall"]), ("1", [])):  # of the probe: 0 is a torch without CUDA
        _, _, calls = setup.run(TORCH_HAS_CUDA=has_cuda)
        assert calls[0].split("--disable-pip-version-check ")[1].split() == [*options, "torch==2.13.0"]
        setup.gpus("")
        setup.run()
        setup.gpus("GPU 0: NVIDIA H200")


def test_setup_refusals(setup):
    code, output, _ = setup.run("requirements-none.txt")
    assert code == 2 and "has no requirements-none.txt" in output
    code, output, _ = setup.run(PYTHON="no-such-python")
    assert code == 2 and "found no Python 3.11" in output


def test_quickstart_and_test_pass_their_flags_on(setup):
    code, output, calls = setup.run("--output_dir", "a b", script="quickstart.sh")
    assert code == 0, output
    assert calls[-1] == f"python {setup.checkout}/scripts/quickstart.py --output_dir a b"
    executable(setup.checkout / ".venv" / "bin" / "ruff", '#!/usr/bin/env bash\necho "ruff $*" >>"$CALLS"\n')
    for script in ("test.sh", "../.ci/run"):
        code, output, calls = setup.run("-k", "yaml", script=script)
        assert code == 0, output
        assert calls[-2:] == ["ruff check .", "python -m pytest -q -n 2 --dist worksteal -k yaml"]
