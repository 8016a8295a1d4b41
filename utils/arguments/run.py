"""From a command line to a validated Config, from a Config back to YAML, and from errors to exit codes.

A step's Config is a dataclass that inherits from blocks of flags. Values come, strongest first, from the command line,
from the files of `--config`, and from the defaults. User errors are one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from utils.arguments.base import is_required, known_flag
from utils.arguments.parser import (
    build_parser,
    convert_yaml,
    flag_actions,
    flag_groups,
    nearest,
    settable_flags,
    split_unknown,
)
from utils.errors import DivergenceError, DoesNotFit, InputError, RankError, RunStopped
from utils.files import atomic_write_text

ConfigT = TypeVar("ConfigT")

SECONDS_TO_SPEAK = 5.0
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # set by DeepSpeed's and torch's launchers
NOT_SAVED = ("local_rank",)  # differs between processes


def parse_first(config_class: type[ConfigT], description: str | None = None) -> ConfigT:
    """Parse the command line of a script before it imports torch, transformers and DeepSpeed, which takes seconds.

    So `--help` and mistyped flags are answered immediately. Ctrl-C during those imports ends the process with one line;
    `run` restores the signal's usual handler.
    """
    signal.signal(signal.SIGINT, _interrupt)
    return parse_config(config_class, description=description)


def run(main: Callable[[ConfigT], Any], config: ConfigT | type[ConfigT], argv: Sequence[str] | None = None) -> None:
    """Entry point of a script: call `main(config)` and turn its errors into exit codes.

    `InputError` exits with 2, `DivergenceError` with 3, `DoesNotFit` with 4 (5 is the watchdog's), `RunStopped` with 75
    (the system's EX_TEMPFAIL: run it again), Ctrl-C with 130, each with one line on stderr. The process group is then
    destroyed, because leaving that to the interpreter's exit occasionally aborts. Any other exception propagates
    without that: destroying the group could wait for other ranks while the launcher waits for this one. For the same
    reason a `RankError` ends the process immediately if the run has several.

    Args:
        config: what `parse_first` returned, or a Config class whose flags are then read from `argv`.
    """
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(config, type):
        config = parse_config(config, argv, description=getattr(sys.modules.get(main.__module__), "__doc__", None))
    exit_code = 0
    try:
        main(config)
    except InputError as error:
        exit_code = _report(error, 2)
        if isinstance(error, RankError) and _has_others():
            os._exit(exit_code)
    except DivergenceError as error:
        exit_code = _report(error, 3)
    except DoesNotFit as error:
        exit_code = _report(error, 4)
    except RunStopped as stop:
        for number in (signal.SIGTERM, signal.SIGINT):  # which a launcher sends to the others when the first exits
            signal.signal(number, signal.SIG_IGN)
        exit_code = _report(stop, os.EX_TEMPFAIL, kind="stopped")
    except KeyboardInterrupt:
        exit_code = _report("interrupted", 130)
    _destroy_process_group()
    if exit_code:
        raise SystemExit(exit_code)


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, *, description: str | None = None
) -> ConfigT:
    """Turn an argument list (default: `sys.argv[1:]`) into a validated instance of `config_class`.

    The only files read are those of `--config`. A user error prints one line on stderr and raises `SystemExit(2)`.
    """
    try:
        return read_flags(config_class, list(sys.argv[1:] if argv is None else argv), description)
    except InputError as error:
        raise SystemExit(_report(error, 2)) from None


def read_flags(config_class: type[ConfigT], argv: list[str], description: str | None = None) -> ConfigT:
    """Like `parse_config`, but a user error is an `InputError`, to which a caller can add where the flags are from."""
    parser = build_parser(config_class, description)
    flags = flag_actions(parser)
    # checked before argparse, which would report the value of the misspelt flag or a missing flag instead
    if (unknown := split_unknown(argv, flags)) is not None:
        raise InputError(f"unknown flag {unknown}{nearest(unknown, flags) or '; --help lists all flags'}")
    try:
        given = parser.parse_args(argv)
        if given.config:
            parser.set_defaults(
                **{name: value for path in given.config for name, value in _read_yaml(path, flags).items()}
            )
            given = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        flag_name = (error.argument_name or "command line").split("/")[0]
        raise InputError(f"{flag_name}: {error.message}") from error
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(config_class):
        if is_required(field) and values[field.name] is None:
            raise InputError(f"--{field.name} is required: {known_flag(config_class, field.name).help}")
    return config_class(**values)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved configuration as YAML that `--config` reads back, one commented paragraph per block."""
    paragraphs = []
    for title, names in flag_groups(type(config)):
        values = {name: getattr(config, name) for name in names if name not in NOT_SAVED}
        if values:
            paragraphs.append(f"# {title}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    atomic_write_text(path, "\n".join(paragraphs))


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML safely, and refuses duplicate keys, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`: explicit keys are meant to override its keys
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} appears twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def read_mapping(path: str | os.PathLike, named: str, example: str) -> dict[Any, Any]:
    """The keys and values of a YAML file; none of an empty file.

    Args:
        named: what errors call the file, such as "--config FILE".
        example: what errors show as a line of such a file.
    Raises:
        InputError: it cannot be read, is no YAML, holds something other than keys and values, or a key twice.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{named}{line}: not valid YAML: {error.problem}") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"{named}: not valid YAML: {error}") from error
    except OSError as error:
        raise InputError(f"{named}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict | None):
        raise InputError(f"{named}: expected lines like '{example}', found a {type(content).__name__}")
    return content or {}


def _read_yaml(path: str, flags: dict[str, argparse.Action]) -> dict[str, Any]:
    """Flag values from a YAML file, validated one by one so that an error names the file and the key."""
    content = read_mapping(path, f"--config {path}", "learning_rate: 1e-5")
    settable = settable_flags(flags)
    values: dict[str, Any] = {}
    for key, value in content.items():
        action = settable.get(key)
        if action is None:
            raise InputError(f"--config {path}: unknown key {str(key)!r}{nearest(str(key), settable)}")
        if action.dest in values:
            raise InputError(f"--config {path}: {key!r} sets --{action.dest}, which the file has set already")
        try:
            values[action.dest] = convert_yaml(action, value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--config {path}: {key}: {error}") from error
    return values


def _report(error: Exception | str, exit_code: int, kind: str = "error") -> int:
    """Print one line on stderr and return the exit code.

    An error that all processes meet is printed by the first one of each machine, and the others wait so that it can:
    a launcher ends all processes as soon as one has exited. A `RankError` is printed by the process that met it.
    """
    line, apart = " ".join(str(error).split()), ""
    if any(name in os.environ for name in LAUNCHERS):  # launchers add their own, longer lines
        apart = "\n"
    if isinstance(error, RankError) and _has_others():
        print(f"{apart}{kind}: rank {os.environ['RANK']}: {line}{apart}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{apart}{kind}: {line}{apart}", file=sys.stderr, flush=True)
    elif _has_others():
        time.sleep(SECONDS_TO_SPEAK)
    return exit_code


def _interrupt(number: int, frame: object) -> None:
    os._exit(_report("interrupted", 130))


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
