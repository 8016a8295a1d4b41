"""Will it fit? The memory that a step needs with given flags, on a machine that need not be this one.

    python scripts/estimate_memory.py step3 --world_size 8 --device_memory 80 \\
        --actor_model_name_or_path llama-2-7b --critic_model_name_or_path output/reward --actor_zero_stage 3 ...

After the step (step1, step2 or step3) come the flags below, and the step's own flags as its main.py takes them. Of a
model only config.json is read. `--dry_run` in a step says the same for this machine and the prepared data. The exit
code is 0 when the run fits, 4 when it does not, 2 for flags that cannot work.

    --world_size N       processes, one per GPU (default 1)
    --device_memory GiB  what each has; left out, only the need is printed
    --device cuda|cpu    GPUs (default), or CPU processes
    --rows N             training rows; left out, the data are prepared and counted where they can be read
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.arguments import refuse_unavailable
from utils.config import parse_config
from utils.data import PackedRows, build_datasets
from utils.errors import DoesNotFit, InputError
from utils.models.loading import load_config, load_matching_tokenizer
from utils.preflight import Subject, print_report
from utils.preflight.machine import cpu_machine, gpu_machine
from utils.preflight.workload import Rows, measure_rows

TRAINING = Path(__file__).resolve().parents[1] / "training"
STEPS = {
    "step1": (1, "step1_supervised_finetuning", ["model"]),
    "step2": (2, "step2_reward_model_finetuning", ["model"]),
    "step3": (3, "step3_rlhf_finetuning", ["actor", "critic"]),
}


def load_step(folder: str) -> ModuleType:
    """The module of a step's main.py, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location(folder, TRAINING / folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder] = module
    spec.loader.exec_module(module)
    return module


def count_rows(config: Any, step: int, configs: dict[str, Any], given: int | None) -> tuple[int, Rows]:
    """Tokens of the tokenizer and the training rows; where tokenizer or data cannot be read, 0 and what is `given`."""
    first = config.actor_model_name_or_path if step == 3 else config.model_name_or_path
    try:
        tokenizer = load_matching_tokenizer(config, first, list(configs.values()))
    except InputError as error:
        print(f"note: without the tokenizer rows are taken at their longest ({error})")
        return 0, Rows(given)
    if given is not None:
        return len(tokenizer), Rows(given)
    lengths = {"max_prompt_len": config.max_prompt_seq_len} if step == 3 else {"max_seq_len": config.max_seq_len}
    extra = {"sft_only_data_path": config.sft_only_data_path} if step == 1 else {}
    try:
        rows, _ = build_datasets(
            {1: "sft", 2: "preference", 3: "prompts"}[step],
            data_path=config.data_path,
            data_split=config.data_split,
            tokenizer=tokenizer,
            seed=config.seed,
            cache_dir=config.data_output_path,
            **lengths,
            **extra,
        )
    except InputError as error:
        print(f"note: without the data rows are taken at their longest ({error})")
        return len(tokenizer), Rows(None)
    if step == 1 and config.packing:
        rows = PackedRows(rows, rows.lengths(), config.max_seq_len)
    size = config.per_device_training_batch_size if step == 3 else config.per_device_train_batch_size
    capacity = config.max_answer_seq_len if step == 3 else config.max_seq_len
    return len(tokenizer), measure_rows(rows, step, size * config.gradient_accumulation_steps, capacity)


def main(argv: list[str]) -> None:
    """Parse, estimate, print.

    Raises:
        InputError: flags that cannot work. DoesNotFit: the run needs more than `--device_memory`.
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
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    step, folder, roles = STEPS[options.step]
    config = parse_config(load_step(folder).Config, flags)
    refuse_unavailable(config)
    configs = {}
    for role in roles:
        name = "model_name_or_path" if role == "model" else f"{role}_model_name_or_path"
        configs[role] = load_config(
            getattr(config, name), f"--{name}", trust_remote_code=config.trust_remote_code, needs_weights=False
        )
    tokens, rows = count_rows(config, step, configs, options.rows)
    memory = None if options.device_memory is None else options.device_memory * 2**30
    if options.device == "cuda":
        machine = gpu_machine(options.world_size, memory)
    else:
        is_read = options.rows is None and rows.count is not None
        machine = cpu_machine(options.world_size, memory, data_is_read=is_read)
    print_report(config, Subject(step, configs, tokens, rows), machine)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except DoesNotFit as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(4) from None
