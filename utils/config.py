"""From a command line to a validated `Config`, and from a `Config` back to YAML.

A step's `Config` is a dataclass that inherits from blocks of flags (`utils.arguments`). Values come, strongest first,
from the command line, from `--config FILE.yaml`, and from the defaults. User errors are one line on stderr and exit
code 2.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from utils.arguments.base import Arguments, field_metadata, flag
from utils.arguments.parser import build_parser, convert_yaml, flag_actions, flag_groups, is_required, nearest
from utils.errors import DivergenceError, DoesNotFit, InputError, RankError, RunStopped
from utils.files import atomic_write_text

__all__ = ["Arguments", "flag", "parse_config", "run", "save_config"]

ConfigT = TypeVar("ConfigT")


def run(main: Callable[[ConfigT], Any], config_class: type[ConfigT], argv: Sequence[str] | None = None) -> None:
    """Entry point of a script: parse the command line, call `main(config)`, turn its errors into exit codes.

    `InputError` exits with 2, `DivergenceError` with 3, `DoesNotFit` with 4 (5 is `utils.watchdog`'s), `RunStopped`
    with 75 (the system's EX_TEMPFAIL: run it again), Ctrl-C with 130, each with one line on stderr. The process group
    is then destroyed, because leaving that to the interpreter's exit aborts now and then. Any other exception passes
    through at once: destroying the group could wait for other ranks while the launcher waits for this one. For the same
    reason a `RankError` ends a process that has others at once.
    """
    config = parse_config(config_class, argv)
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
        for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's, sent to the others when the first has gone
            signal.signal(number, signal.SIG_IGN)
        exit_code = _report(stop, os.EX_TEMPFAIL, kind="stopped")
    except KeyboardInterrupt:
        exit_code = _report("interrupted", 130)
    _destroy_process_group()
    if exit_code:
        raise SystemExit(exit_code)


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Turn an argument list (default: `sys.argv[1:]`) into a validated instance of `config_class`.

    The only file read is that of `--config`. A user error prints one line on stderr and raises `SystemExit(2)`.
    """
    try:
        return _parse(config_class, list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        raise SystemExit(_report(error, 2)) from None


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved configuration as YAML that `--config` reads back, one commented paragraph per block.

    `local_rank` differs between processes and is left out.
    """
    paragraphs = []
    for title, names in flag_groups(type(config)):
        values = {name: getattr(config, name) for name in names if name != "local_rank"}
        if values:
            paragraphs.append(f"# {title}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    atomic_write_text(path, "\n".join(paragraphs))


def _parse(config_class: type[ConfigT], argv: list[str]) -> ConfigT:
    parser = build_parser(config_class)
    flags = flag_actions(parser)
    for token in argv:  # before argparse, which would name a misspelt flag's value or a missing flag instead
        name = token.split("=")[0]
        if name.startswith("--") and name not in flags:
            raise InputError(f"unknown flag {name}{nearest(name, flags) or '; --help lists all flags'}")
    try:
        given = parser.parse_args(argv)
        if given.config is not None:
            parser.set_defaults(**_read_yaml(given.config, flags))
            given = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        flag_name = (error.argument_name or "command line").split("/")[0]
        raise InputError(f"{flag_name}: {error.message}") from error
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(config_class):
        if is_required(field) and values[field.name] is None:
            raise InputError(f"--{field.name} is required: {field_metadata(config_class, field.name)['help']}")
    return config_class(**values)


def _read_yaml(path: str, flags: dict[str, argparse.Action]) -> dict[str, Any]:
    """Flag values from a YAML file, validated one by one so that an error names the file and the key."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config {path}{line}: not valid YAML: {error.problem}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict | None):
        raise InputError(
            f"--config {path}: expected lines like 'learning_rate: 1e-5', found a {type(content).__name__}"
        )
    settable = {name[2:]: action for name, action in flags.items() if action.nargs != 0 and action.dest != "config"}
    values: dict[str, Any] = {}
    for key, value in (content or {}).items():
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
    """Print one line on stderr and pass the exit code on.

    What all processes meet is told by the first one of each machine; a `RankError` by the one that met it.
    """
    line = " ".join(str(error).split())
    if isinstance(error, RankError) and _has_others():
        print(f"{kind}: rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{kind}: {line}", file=sys.stderr, flush=True)
    return exit_code


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
