"""The steps' main.py files, loaded by path (they are scripts, not modules), and their flags on the tiny world."""

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.arguments import StepConfig, parse_config
from utils.arguments.base import is_required
from utils.arguments.steps import STEPS as TABLE

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = {name: REPOSITORY / "training" / step.folder / "main.py" for name, step in TABLE.items()}
StepName = int | str  # a name of the table; the number of a step of the chain is short for it: 1 is "step1"


def name_of(step: StepName) -> str:
    return step if isinstance(step, str) else f"step{step}"


def config_of(step: StepName) -> type[StepConfig]:
    return TABLE[name_of(step)].config


def script_of(step: StepName) -> Path:
    return STEPS[name_of(step)]


def required_models(step: StepName, path: str = "nowhere") -> list[str]:
    """The flags without which a step does not start, which all name a model."""
    required = [field.name for field in dataclasses.fields(config_of(step)) if is_required(field)]
    return [word for name in required for word in (f"--{name}", path)]


def load_step(step: StepName) -> ModuleType:
    """The module of a step's main.py, with its `Config` and `main`."""
    return _load(name_of(step))


@functools.cache
def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_main", STEPS[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def values_of(world, step: StepName, output: Path | None = None, **changes) -> dict[str, Any]:
    """The values of the flags that a step on the tiny world is given."""
    values: dict[str, Any] = {"data_path": [world["data"]], "data_output_path": world["cache"], "dtype": "fp32"}
    values["data_split"] = "1,1,1"
    if hasattr(config_of(step), "max_seq_len"):
        values |= {"model_name_or_path": world["model"], "max_seq_len": 64, "per_device_train_batch_size": 4}
        values |= {"learning_rate": 1e-3}
    else:
        values |= {"actor_model_name_or_path": world["model"], "critic_model_name_or_path": world["reward"]}
        values |= {"per_device_generation_batch_size": 4, "per_device_training_batch_size": 2, "max_steps": 2}
        values |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "eval_prompts": 2, "num_warmup_steps": 0}
    if output is not None:
        values["output_dir"] = str(output)
    return values | changes


def step_config(world, step: StepName, output: Path | None = None, **changes) -> StepConfig:
    """The Config of a step on the tiny world."""
    return config_of(step)(**values_of(world, step, output, **changes))


def flags(world, step: StepName, output: Path | None = None, **changes) -> list[str]:
    """The command line of a step on the tiny world; True is a switch, a list several words."""
    words = []
    for name, value in values_of(world, step, output, **changes).items():
        words.append(f"--{name}")
        if value is not True:
            words += [str(word) for word in (value if isinstance(value, list) else [value])]
    return words


def run_step(step: StepName, argv: list[str]) -> dict[str, float]:
    script = load_step(step)
    return script.main(parse_config(script.Config, argv))
