"""The three steps' main.py files, loaded by path: they are scripts, not modules of a package."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = {
    1: REPOSITORY / "training" / "step1_supervised_finetuning" / "main.py",
    2: REPOSITORY / "training" / "step2_reward_model_finetuning" / "main.py",
    3: REPOSITORY / "training" / "step3_rlhf_finetuning" / "main.py",
}


@functools.cache
def load_step(step: int) -> ModuleType:
    """The module of a step's main.py, with its `Config` and `main`."""
    spec = importlib.util.spec_from_file_location(f"step{step}_main", STEPS[step])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
