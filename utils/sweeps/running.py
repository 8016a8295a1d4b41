"""The runs of a sweep, one after the other."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from utils.errors import InputError
from utils.files import make_writable
from utils.sweeps.folders import Place, find_places, numbers_of, read_summary
from utils.sweeps.grid import Sweep
from utils.sweeps.processes import command_of, last_error, run_to_its_end
from utils.sweeps.report import FAILED, FINISHED, INTERRUPTED, WAITING, Outcome, write_report


def planned(sweep: Sweep, output_dir: Path, num_gpus: int | None) -> list[tuple[Place, Outcome]]:
    """Where each run is, and what is known of it before the sweep starts.

    Raises:
        InputError: the folder of a run holds another run, or no finished run has the metric.
    """
    pairs = []
    for place in find_places(sweep, output_dir, num_gpus or 1):
        state, numbers = (WAITING, {}) if place.summary is None else (FINISHED, place.summary)
        command = shlex.join(command_of(place, sweep.step, num_gpus))
        pairs.append(
            (place, Outcome(place.run.name, place.folder, place.log, place.run.values, numbers, state, command))
        )
    refuse_unknown_metric(sweep, [outcome for _, outcome in pairs])
    return pairs


def run_sweep(
    sweep: Sweep, output_dir: Path, *, num_gpus: int | None = None, stop_on_failure: bool = False
) -> list[Outcome]:
    """Run what has not finished yet, with a line of progress for each run, and return the outcome of all.

    The table in `output_dir` is up to date after each run.

    Args:
        num_gpus: processes of DeepSpeed's launcher; None runs one process without it.
        stop_on_failure: end at the first run that fails, instead of going on with the others.
    Raises:
        InputError: as `planned`; or `output_dir` cannot be written.
        KeyboardInterrupt: Ctrl-C, after the run in progress has stopped.
    """
    pairs = planned(sweep, output_dir, num_gpus)
    outcomes = [outcome for _, outcome in pairs]
    try:
        make_writable(output_dir)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from error
    for index, (place, outcome) in enumerate(pairs):
        told = f"[{index + 1}/{len(pairs)}] {outcome.name}"
        if outcome.state == FINISHED:
            print(f"{told}: finished before, {_metric_of(sweep, outcome)}", flush=True)
            continue
        print(f"{told}: running; log: {place.log}", flush=True)
        started = time.perf_counter()
        try:
            code = run_to_its_end(command_of(place, sweep.step, num_gpus, free_port=True), place)
        except KeyboardInterrupt:
            outcomes[index] = dataclasses.replace(outcome, state=INTERRUPTED)
            write_report(output_dir, sweep, outcomes, picture=False)
            raise
        took = f"{time.perf_counter() - started:.0f} s"
        outcomes[index] = outcome = _ended(outcome, place, code)
        if outcome.state == FINISHED:
            print(f"{told}: done in {took}, {_metric_of(sweep, outcome)}", flush=True)
        else:
            print(f"{told}: FAILED with exit code {code} after {took}: {outcome.reason}", flush=True)
        write_report(output_dir, sweep, outcomes, picture=False)
        if stop_on_failure and outcome.state == FAILED:
            break
    return outcomes


def refuse_unknown_metric(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Raise `InputError` if there are finished runs and none has the metric: a step always writes the same numbers."""
    finished = [outcome for outcome in outcomes if outcome.state == FINISHED]
    if finished and not any(sweep.metric in outcome.numbers for outcome in finished):
        known = ", ".join(sorted(finished[0].numbers))
        raise InputError(f"metric: the summaries have no {sweep.metric}; they have {known}")


def _ended(outcome: Outcome, place: Place, code: int) -> Outcome:
    summary = read_summary(place.folder)
    if code == 0 and summary is not None:
        return dataclasses.replace(outcome, numbers=numbers_of(summary), state=FINISHED)
    reason = last_error(place.log) or (f"exit code {code}" if code else "it wrote no summary")
    return dataclasses.replace(outcome, state=FAILED, reason=reason)


def _metric_of(sweep: Sweep, outcome: Outcome) -> str:
    if sweep.metric not in outcome.numbers:
        return f"but its summary has no {sweep.metric}"
    return f"{sweep.metric} {outcome.numbers[sweep.metric]:.4g}"
