"""Will it fit? The memory that a step needs with given flags, on a machine that need not be this one.

    python scripts/estimate_memory.py step3 --world_size 8 --device_memory 80 \\
        --actor_model_name_or_path llama-2-7b --critic_model_name_or_path output/reward --actor_zero_stage 3 ...

After the step (step1, step2, ...; --help lists them) come the flags below, and the step's own flags as its main.py
takes them. Of a model only config.json is read. `--dry_run` in a step says the same for this machine and the prepared
data. The exit code is 0 when the run fits, 4 when it does not, 2 for flags that cannot work.

    --world_size N       processes, one per GPU (default 1)
    --device_memory GiB  what each has; left out, only the need is printed
    --device cuda|cpu    GPUs (default), or CPU processes
    --rows N             training rows; left out, the data are prepared and counted where they can be read
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedConfig

from utils.arguments import SftConfig, StepConfig, parse_config, refuse_unavailable
from utils.arguments.steps import STEPS
from utils.data import Corpus, build_datasets, pack_rows
from utils.data.batches.sizes import Rows, measure_rows
from utils.errors import DoesNotFit, InputError
from utils.models.checks import load_config, load_matching_tokenizer
from utils.preflight import Machine, Subject, print_report
from utils.preflight.machine import cpu_machine, gpu_machine

TRAINING = Path(__file__).resolve().parents[1] / "training"


def load_step(folder: str) -> ModuleType:
    """The module of a step's main.py, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location(folder, TRAINING / folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder] = module
    spec.loader.exec_module(module)
    return module


def read_models(config: StepConfig) -> dict[str, PreTrainedConfig]:
    """The configurations of the models by role: one for all roles that start from the same path."""
    roles, read = config.roles(), {}
    for role in roles.values():
        if role.path not in read:
            read[role.path] = load_config(
                role.path, role.path_flag, trust_remote_code=config.trust_remote_code, needs_weights=False
            )
    return {name: read[role.path] for name, role in roles.items()}


def count_rows(config: StepConfig, models: dict[str, PreTrainedConfig], given: int | None) -> tuple[int, Rows]:
    """Tokens of the tokenizer and the training rows; where tokenizer or data cannot be read, 0 and what is `given`."""
    try:
        tokenizer = load_matching_tokenizer(config, models)
    except InputError as error:
        print(f"note: without the tokenizer rows are taken at their longest ({error})")
        return 0, Rows(given)
    if given is not None:
        return len(tokenizer), Rows(given)
    try:
        rows, _ = build_datasets(Corpus.of(config), tokenizer)
    except InputError as error:
        print(f"note: without the data rows are taken at their longest ({error})")
        return len(tokenizer), Rows(None)
    if isinstance(config, SftConfig):
        rows = pack_rows(rows, config, config.max_seq_len)
    return len(tokenizer), measure_rows(rows, config.purpose, config.step_rows, config.answer_limit)


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and those of the step.

    Raises:
        InputError: a number that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--device_memory", type=float)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int)
    options, flags = parser.parse_known_args(argv)
    for name, least in (("world_size", 1), ("device_memory", 0), ("rows", 1)):
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, got {value}")
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    return options, flags


def make_machine(options: argparse.Namespace, rows: Rows) -> Machine:
    """The machine that the flags describe."""
    memory = None if options.device_memory is None else options.device_memory * 2**30
    if options.device == "cuda":
        return gpu_machine(options.world_size, memory)
    is_read = options.rows is None and rows.count is not None
    return cpu_machine(options.world_size, memory, data_is_read=is_read)


def main(argv: list[str]) -> None:
    """Parse, estimate, print.

    Raises:
        InputError: flags that cannot work. DoesNotFit: the run needs more than `--device_memory`.
    """
    options, flags = parse_options(argv)
    step = load_step(STEPS[options.step].folder)
    config = parse_config(step.Config, flags)
    refuse_unavailable(config)
    models = read_models(config)
    tokens, rows = count_rows(config, models, options.rows)
    print_report(config, Subject(step.plan_of, models, tokens, rows), make_machine(options, rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except DoesNotFit as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(4) from None
