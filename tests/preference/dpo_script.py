"""The script of direct preference optimisation, loaded by path, and its flags on the tiny world."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from step_scripts import write_rows

from utils.arguments import DpoConfig

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "step2_dpo_finetuning" / "main.py"


@cache
def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpo_main", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def config(world, output: Path | None = None, **changes) -> DpoConfig:
    values = {"data_path": [world["data"]], "data_output_path": world["cache"], "dtype": "fp32", "data_split": "0,1,0"}
    values |= {"model_name_or_path": world["model"], "max_seq_len": 64, "per_device_train_batch_size": 4}
    values |= {"learning_rate": 1e-3, "num_sample_generations": 2, "sample_max_new_tokens": 8, "max_steps": 4}
    if output is not None:
        values["output_dir"] = str(output)
    return DpoConfig(**(values | changes))


def run_script(configuration: DpoConfig) -> dict[str, float]:
    return load_script().main(configuration)


def labelled_file(folder: Path, count: int = 24) -> str:
    """Rows of one answer each: polite ones are desirable."""
    rows = []
    for index in range(count):
        prompt = f" Human: what colour is thing {index} ? Assistant:"
        rows.append({"prompt": prompt, "completion": f" it is {['red', 'white'][index % 2]} .", "label": True})
        rows.append({"prompt": prompt, "completion": " go away !", "label": index % 5 == 0})
    return write_rows(folder / "labelled.jsonl", rows)
