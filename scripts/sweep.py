"""Train with every combination of flags in a YAML file, one run after the other, and compare them.

    python scripts/sweep.py FILE.yaml [--output_dir FOLDER] [--num_gpus N] [flags of the step for all runs]
    python scripts/sweep.py scripts/sweeps/dpo.yaml --num_gpus 8 --model_name_or_path models/llama-2-7b

Every run is an ordinary command of this project in a folder of its own, with its log beside it. All flags are checked
before the first one starts. The same command again skips runs that have finished, and continues one that was stopped
if the runs save checkpoints (`save_interval`). At the end there are a table (sweep.md, sweep.json) and a picture
(sweep.png) in the output folder. `utils/sweeps/grid.py` describes the file, docs/sweeps.md the rest.

    --output_dir FOLDER   default: output/sweep/ and the name of the file
    --num_gpus N          run through DeepSpeed's launcher on N processes, CPUs too; default: one process
    --stop_on_failure     end at the first run that fails; otherwise the others go on
    --dry_run             print the commands of the runs, and stop

Exit code: 0 when all runs have finished, 1 when some failed, 2 for a wrong file or flag, 130 for Ctrl-C.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from utils.errors import InputError, counted
from utils.sweeps.grid import read_sweep

REPOSITORY = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and those of the step.

    Raises:
        InputError: a flag that cannot be.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE.yaml", type=Path)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--stop_on_failure", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    if argv and argv[0].startswith("-") and not {"-h", "--help"} & set(argv):
        raise InputError("name the sweep's file first: python scripts/sweep.py FILE.yaml [flags]")
    options, flags = parser.parse_known_args(argv)
    if options.num_gpus is not None and options.num_gpus < 1:
        raise InputError(f"--num_gpus {options.num_gpus}: give 1 or more, or leave it out for one process")
    options.output_dir = (options.output_dir or REPOSITORY / "output" / "sweep" / options.file.stem).absolute()
    return options, flags


def main(argv: Sequence[str]) -> None:
    """Read the file, run the runs, compare them.

    Raises:
        InputError: a file or flag that cannot work. SystemExit(1): a run failed.
    """
    options, flags = parse_options(argv)
    sweep, folder = read_sweep(options.file, options.output_dir, flags), options.output_dir

    from utils.sweeps.picture import draw_sweep  # after the checks, which need none of the slow imports
    from utils.sweeps.report import FAILED, PICTURE_FILE, TABLE_FILE, render_text, write_report
    from utils.sweeps.running import planned, refuse_unknown_metric, run_sweep

    if options.dry_run:
        for _, outcome in planned(sweep, folder, options.num_gpus):
            print(f"# {outcome.name}: {outcome.state}\n{outcome.command}")
        return
    print(f"{options.file}: {counted(len(sweep.runs), 'run')} of {sweep.step} in {folder}", flush=True)
    outcomes = run_sweep(sweep, folder, num_gpus=options.num_gpus, stop_on_failure=options.stop_on_failure)
    picture = draw_sweep(sweep, outcomes, folder / PICTURE_FILE)
    write_report(folder, sweep, outcomes, picture is not None)
    print(f"\n{render_text(sweep, outcomes)}\n\ntable: {folder / TABLE_FILE}", flush=True)
    print(f"picture: {picture or 'none, for no run has a finite ' + sweep.metric}", flush=True)
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    for outcome in failed:
        print(f"error: {outcome.name} failed: {outcome.reason}; log: {outcome.log}", file=sys.stderr)
    if failed:
        raise SystemExit(1)
    refuse_unknown_metric(sweep, outcomes)


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # end the run in progress first, as for Ctrl-C
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues the sweep", file=sys.stderr)
        raise SystemExit(130) from None
