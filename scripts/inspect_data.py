"""What a step will train on: counts, rows as the model sees them, lengths, length bias, duplicates. Loads no model.

    python scripts/inspect_data.py --data_path pairs.jsonl --model_name_or_path llama-2-7b --step step2 \\
        --max_seq_len 512 --output_dir output/inspect

Give the flags of the step, the filters among them, or its --config: the rows are prepared by the same code. Of the
model only the tokenizer is read. Writes inspect.json and inspect.png into --output_dir. The exit code is 2 for input
that cannot work.

    --step STEP          step1 (default), step2, dpo or step3; for step3 --model_name_or_path stands for the actor's
                         and the critic's, and --max_seq_len for --max_prompt_seq_len
    --show N             training rows to show (default 3)
    --output_dir FOLDER  (default output/inspect)
"""

import argparse
import json
import os
import sys
from pathlib import Path

from utils.arguments import StepConfig, parse_config, refuse_unavailable
from utils.arguments.steps import STEPS
from utils.errors import InputError
from utils.files import atomic_write_text, try_writing
from utils.inspection.measures import inspect
from utils.inspection.picture import draw_inspection
from utils.inspection.shown import figures_as_text, rows_as_text
from utils.models.checks import load_matching_tokenizer
from utils.runs.session import check_data_stays

OUTPUT = "output/inspect"
# What one model's flags mean in step 3, which has several.
MEANINGS = {
    "--model_name_or_path": ("--actor_model_name_or_path", "--critic_model_name_or_path"),
    "--max_seq_len": ("--max_prompt_seq_len",),
}


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, StepConfig]:
    """The flags of this script, and the step's configuration.

    Raises:
        InputError: a number that cannot be, or a flag that cannot be used here.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--step", choices=STEPS, default="step1")
    parser.add_argument("--show", type=int, default=3)
    parser.add_argument("--output_dir", "--output-dir", default=OUTPUT)
    options, flags = parser.parse_known_args(argv)
    if options.show < 0:
        raise InputError(f"--show must be at least 0, got {options.show}")
    if options.step == "step3":
        flags = _for_step3(flags)
    config = parse_config(STEPS[options.step].config, [*flags, "--output_dir", options.output_dir])
    if config.streaming:
        raise InputError("--streaming: rows are measured after all have been prepared; leave it out to inspect them")
    refuse_unavailable(config)
    return options, config


def _for_step3(flags: list[str]) -> list[str]:
    """`flags` with those of `MEANINGS` replaced, unless what they stand for is given as well."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    for name, meanings in MEANINGS.items():
        if name in words[:-1]:
            place = words.index(name)
            value = words[place + 1]
            words[place : place + 2] = [word for other in meanings if other not in words for word in (other, value)]
    return words


def main(argv: list[str]) -> None:
    """Prepare, measure, print, draw.

    Raises:
        InputError: flags or data that cannot work.
    """
    options, config = parse_options(argv)
    folder = Path(options.output_dir)
    check_data_stays(config)
    try:
        try_writing(folder)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror}); choose another") from error
    tokenizer = load_matching_tokenizer(config, {})
    inspection = inspect(config, tokenizer)

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = [inspection.train[index] for index in range(min(options.show, len(inspection.train)))]
    if shown:
        print(rows_as_text(shown, tokenizer, colour=colour), end="\n\n")
    print(figures_as_text(inspection))
    atomic_write_text(folder / "inspect.json", json.dumps(inspection.report(), indent=2, ensure_ascii=False) + "\n")
    picture = draw_inspection(inspection, folder / "inspect.png", f"{options.step}: {', '.join(config.data_path)}")
    print(f"\nsaved to {folder / 'inspect.json'} and {picture}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
