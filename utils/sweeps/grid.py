"""A sweep's YAML file and its runs: every combination, checked before the first one starts.

step: dpo                      a name of the table of steps
config: [presets/dpo.yaml]     optional: preset files, as for --config
flags: {max_seq_len: 512}      optional: flags that all runs share
grid:                          values of flags; every combination of them is a run
  beta: [0.05, 0.1]
runs:                          optional: sets of flags that change together; each is combined with the grid
- {lora_dim: 0, learning_rate: 1.0e-6}
- {lora_dim: 64, learning_rate: 1.0e-5}
metric: eval/accuracy          the number in summary.json by which the runs are compared
goal: max                      or min
columns: [train_seconds]       optional: further numbers of summary.json to show
"""

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.arguments.base import known_flags
from utils.arguments.parser import build_parser, convert_yaml, flag_actions, nearest, settable_flags
from utils.arguments.rules import refuse_unavailable
from utils.arguments.run import read_flags, read_mapping
from utils.arguments.steps import STEPS, StepConfig
from utils.errors import InputError

KEYS = ("step", "config", "flags", "grid", "runs", "metric", "goal", "columns")
GOALS = ("max", "min")
SET_BY_THE_SWEEP = ("output_dir", "resume_from_checkpoint", "dry_run", "local_rank")
# A resumed run may change these flags, but its result is another one then.
CHANGE_THE_RESULT = ("max_steps", "num_train_epochs", "enable_test_mode", "test_stop_step", "on_nan")
LONGEST_NAME = 120  # of a folder; file systems allow 255

Flags = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One combination of the swept flags.

    Attributes:
        name: of its folder.
        values: swept flag -> its value, resolved: also of those that only other runs set.
        words: its flags as they are written on a command line, without the output folder.
        config: the same, parsed, with the output folder.
    """

    name: str
    values: Flags
    words: tuple[str, ...]
    config: StepConfig


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says; `swept` are the flags that differ between runs, in the order of the file."""

    step: str
    metric: str
    goal: str
    columns: tuple[str, ...]
    swept: tuple[str, ...]
    runs: tuple[Run, ...]


def read_sweep(path: str | Path, output_dir: Path, further: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file and parse the command line of every run.

    Args:
        output_dir: the folder in which each run gets its own.
        further: words of a command line, flags of the step that override those that the file gives to all runs.
    Raises:
        InputError: the file cannot be read; a key, step or flag is unknown; a value or combination is refused by the
            step; two runs are the same.
    """
    content = read_mapping(path, str(path), "step: step1")
    try:
        return _sweep_of(content, output_dir, list(further))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def relevant_flags(config: StepConfig) -> Flags:
    """The flags of a run that affect its result, and their values. Runs that agree in them are the same run."""
    return {
        name: getattr(config, name)
        for name, known in known_flags(type(config)).items()
        if name not in SET_BY_THE_SWEEP and (known.resume != "free" or name in CHANGE_THE_RESULT)
    }


def _sweep_of(content: dict[Any, Any], output_dir: Path, further: list[str]) -> Sweep:
    for key in content:
        if key not in KEYS:
            raise InputError(f"unknown key {str(key)!r}{nearest(str(key), KEYS) or '; known are ' + ', '.join(KEYS)}")
    step, goal = _text(content, "step"), _text(content, "goal")
    if step not in STEPS:
        raise InputError(f"step: there is no step {step!r}; choose from {', '.join(STEPS)}")
    if goal not in GOALS:
        raise InputError(f"goal: expected max or min, got {goal!r}")
    metric, columns = _text(content, "metric"), tuple(_texts(content, "columns"))
    reader = _FlagReader(STEPS[step].config)
    shared = reader.read(content.get("flags"), "flags")
    combinations = list(_combinations(reader, content.get("grid"), content.get("runs")))
    swept = tuple(dict.fromkeys(name for values in combinations for name in values))
    reader.refuse_overlap(swept, shared, further)
    presets = _texts(content, "config")
    first = (["--config", *presets] if presets else []) + to_words(shared)
    runs: dict[str, Run] = {}
    for values in combinations:
        name = folder_name(values)
        words = [*first, *to_words(values), *further]
        config = _parse(STEPS[step].config, name, [*words, "--output_dir", str(output_dir / name)])
        resolved = {flag: getattr(config, flag) for flag in swept}
        for other in runs.values():
            if relevant_flags(other.config) == relevant_flags(config):
                both = f"{other.name} and {name}" if name != other.name else name
                raise InputError(f"two runs have the same flags: {both}; leave one out")
        runs[name] = Run(name, resolved, tuple(words), config)
    return Sweep(step, metric, goal, columns, swept, tuple(runs.values()))


def _parse(config_class: type[StepConfig], name: str, words: list[str]) -> StepConfig:
    try:
        config = read_flags(config_class, words)
        refuse_unavailable(config)
    except InputError as error:
        raise InputError(f"run {name}: {error}") from error
    return config


def _text(content: dict[Any, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key}: expected text, got {'nothing' if value is None else repr(value)}")
    return value


def _texts(content: dict[Any, Any], key: str) -> list[str]:
    value = content.get(key)
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(text, str) or not text for text in texts):
        raise InputError(f"{key}: expected a list of texts, got {value!r}")
    return texts


class _FlagReader:
    """Reads flags of one step from YAML, each value as the step would read it from a file of --config."""

    def __init__(self, config_class: type[StepConfig]) -> None:
        self.spellings = flag_actions(build_parser(config_class))
        self.settable = settable_flags(self.spellings)
        self.names = {field.name for field in fields(config_class)}

    def read(self, flags: Any, where: str) -> Flags:
        if not isinstance(flags, dict | None):
            raise InputError(f"{where}: expected lines like 'learning_rate: 1e-5', found a {type(flags).__name__}")
        read: Flags = {}
        for key, value in (flags or {}).items():
            action = self.action(key, where)
            if action.dest in read:
                raise InputError(f"{where}: {key} sets --{action.dest}, which is set already")
            read[action.dest] = self.value(action, key, value, where)
        return read

    def action(self, key: Any, where: str) -> argparse.Action:
        action = self.settable.get(key)
        if action is None or action.dest not in self.names:
            raise InputError(f"{where}: unknown flag {str(key)!r}{nearest(str(key), self.settable)}")
        if action.dest in SET_BY_THE_SWEEP:
            raise InputError(f"{where}: {key} is set by the sweep itself; leave it out")
        return action

    def value(self, action: argparse.Action, key: Any, value: Any, where: str) -> Any:
        if value is None or value == []:
            raise InputError(f"{where}: {key} has no value; leave it out for its default")
        try:
            return convert_yaml(action, value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {key}: {error}") from error

    def refuse_overlap(self, swept: Sequence[str], shared: Flags, further: list[str]) -> None:
        """A flag has its value from one place only, except that the command line overrides what all runs share."""
        for name in swept:
            if name in shared:
                raise InputError(f"--{name} is swept and among the flags of all runs; leave one of the two out")
        for word in further:
            action = self.spellings.get(word.split("=")[0])
            if action is not None and action.dest in swept:
                raise InputError(f"{word} is swept, so the command line cannot set it; change the file")
            if action is not None and action.dest in SET_BY_THE_SWEEP:
                raise InputError(f"{word} is set by the sweep itself; leave it out")


def _combinations(reader: _FlagReader, grid: Any, runs: Any) -> Iterator[Flags]:
    """Every entry of `runs` with every combination of the grid; the last flag of the grid changes fastest."""
    if not isinstance(grid, dict | None):
        raise InputError(f"grid: expected lines like 'learning_rate: [1e-6, 1e-5]', found a {type(grid).__name__}")
    if not isinstance(runs, list | None):
        raise InputError(f"runs: expected a list of sets of flags, found a {type(runs).__name__}")
    if not grid and not runs:
        raise InputError("nothing to sweep: name flags and their values under grid, or sets of flags under runs")
    axes: dict[str, list[Any]] = {}
    for key, values in (grid or {}).items():
        action = reader.action(key, "grid")
        if not isinstance(values, list) or not values:
            raise InputError(f"grid: {key}: expected a list of values such as [1, 2], got {values!r}")
        if action.dest in axes:
            raise InputError(f"grid: {key} sets --{action.dest}, which is set already")
        axes[action.dest] = [reader.value(action, key, value, "grid") for value in values]
    sets = [reader.read(flags, f"runs, entry {number}") for number, flags in enumerate(runs or [{}], start=1)]
    for flags in sets:
        if both := sorted(flags.keys() & axes.keys()):
            raise InputError(f"--{both[0]} is in the grid and under runs; leave one of the two out")
        if not flags and not axes:
            raise InputError("runs: an entry sets no flag")
        for values in itertools.product(*axes.values()):
            yield flags | dict(zip(axes, values, strict=True))


def to_words(flags: Flags) -> list[str]:
    """Flags as they are written on a command line."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(show, value)]
        else:
            text = show(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def show(value: Any) -> str:
    """A flag's value as text: 1e-05, true, several values with spaces between them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(show, value)) if isinstance(value, list) else str(value)


def folder_name(values: Flags) -> str:
    """A folder's name from the swept values. Values that a file system may not take are replaced; a hash of all of them
    then keeps the name apart from others."""
    plain = "_".join(f"{name}-{show(value)}" for name, value in values.items())
    name = re.sub(r"[^\w.+-]+", "-", plain, flags=re.ASCII)
    if name == plain and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"
