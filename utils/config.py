"""From a command line to a validated `Config`, and from a `Config` back to YAML.

A step's `Config` is a dataclass that inherits from blocks of flags (`utils.arguments`). Values come, strongest first, from
the command line, from `--config FILE.yaml`, and from the defaults. User errors are one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from utils.arguments.base import Arguments, field_metadata, flag
from utils.errors import DivergenceError, InputError
from utils.files import atomic_write_text

__all__ = ["Arguments", "flag", "parse_config", "run", "save_config"]

ConfigT = TypeVar("ConfigT")


def run(main: Callable[[ConfigT], Any], config_class: type[ConfigT], argv: Sequence[str] | None = None) -> None:
    """Entry point of a script: parse the command line, call `main(config)`, turn its errors into exit codes.

    `InputError` exits with 2, `DivergenceError` with 3, Ctrl-C with 130, each with one line on stderr. The process group is
    destroyed on the way out, because leaving it to the interpreter's exit aborts now and then.
    """
    config = parse_config(config_class, argv)
    try:
        main(config)
    except InputError as error:
        _stop(str(error), 2)
    except DivergenceError as error:
        _stop(str(error), 3)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    finally:
        _destroy_process_group()


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Turn an argument list (default: `sys.argv[1:]`) into a validated instance of `config_class`.

    The only file read is that of `--config`. A user error prints one line on stderr and raises `SystemExit(2)`.
    """
    try:
        return _parse(config_class, list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        _stop(str(error), 2)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved configuration as YAML that `--config` reads back, one commented paragraph per block.

    `local_rank` differs between processes and is left out.
    """
    paragraphs = []
    for title, names in _groups(type(config)):
        values = {name: getattr(config, name) for name in names if name != "local_rank"}
        if values:
            paragraphs.append(f"# {title}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    atomic_write_text(path, "\n".join(paragraphs))


def _parse(config_class: type[ConfigT], argv: list[str]) -> ConfigT:
    parser = _build_parser(config_class)
    flags = _flag_actions(parser)
    for token in argv:
        name = token.split("=")[0]
        if name.startswith("--") and name not in flags and name != "--":
            raise InputError(f"unknown flag {name}{_nearest(name, flags)}")
    try:
        given = parser.parse_args(argv)
        if given.config is not None:
            parser.set_defaults(**_read_yaml(given.config, flags))
            given = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{(error.argument_name or 'command line').split('/')[0]}: {error.message}") from error
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(config_class):
        if _is_required(field) and values[field.name] is None:
            raise InputError(f"--{field.name} is required: {field_metadata(config_class, field.name).get('help')}")
    return config_class(**values)


# --- the parser ------------------------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    """Raises `InputError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling per flag (argparse also accepts dashes for underscores) and defaults only where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [name for name in action.option_strings if "-" not in name[2:]]
        takes_value = action.nargs not in (0, "?")
        return ", ".join(spellings) + (f" {self._format_args(action, _metavar(action))}" if takes_value else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if says_nothing or action.default in ("", []) or action.nargs == 0:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {'on' if default is True else default})".replace("%", "%%")


def _metavar(action: argparse.Action) -> str:
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = action.type.args[0] if isinstance(action.type, functools.partial) else str
    return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")


def _build_parser(config_class: type) -> _Parser:
    """An `HfArgumentParser` with one group per block. No flag is `required` for argparse: `_parse` checks that."""
    parser = _Parser(
        [_group_view(config_class, title, names) for title, names in _groups(config_class)],
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
        description=inspect.getdoc(sys.modules.get(config_class.__module__)),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="read flags from a YAML file; the command line wins over it"
    )
    for action in set(_flag_actions(parser).values()):
        action.required = False
        if action.type is not None:
            action.type = functools.partial(_convert, action.type, action.choices)
        elif action.nargs == 0 and action.dest != "help":
            action.help = f"turn --{action.dest} off"
    return parser


def _group_view(config_class: type, title: str, names: list[str]) -> type:
    """A dataclass with some of the fields of `config_class`, as `HfArgumentParser` wants for a titled group."""
    types = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    views = []
    for name in names:
        known = field_metadata(config_class, name)
        text = known.get("help", "").replace("%", "%%") + (" (required)" if _is_required(fields[name]) else "")
        view = dataclasses.field(
            default=fields[name].default,
            default_factory=fields[name].default_factory,
            metadata={"help": text, "aliases": known.get("aliases", [])},
        )
        views.append((name, types[name], view))
    return dataclasses.make_dataclass("View", views, kw_only=True, namespace={"_argument_group_name": title})


def _groups(config_class: type) -> Iterator[tuple[str, list[str]]]:
    """Title and field names per block: the direct bases of `config_class` in order, then its own additions."""
    remaining = [field.name for field in dataclasses.fields(config_class)]
    for block in (*config_class.__bases__, config_class):
        names = [name for name in remaining if name in getattr(block, "__dataclass_fields__", {})]
        remaining = [name for name in remaining if name not in names]
        if names:
            yield (inspect.getdoc(block) or block.__name__).splitlines()[0].rstrip("."), names


def _flag_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# --- values ----------------------------------------------------------------------------------------------------------


def _convert(kind: Callable[[str], Any], choices: Sequence[Any] | None, text: str) -> Any:
    """Text to a flag's value; an `ArgumentTypeError` says in plain words what was expected."""
    if choices:
        value = kind(text)
        if value not in choices:
            raise argparse.ArgumentTypeError(
                f"unknown choice {text!r}; choose from {', '.join(map(str, choices))}{_nearest(text, map(str, choices))}"
            )
        return value
    if kind is int:
        if (value := _try(int, text)) is not None:
            return value
        if (value := _try(float, text)) is not None and value.is_integer():  # 1e3
            return int(value)
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    if kind is float:
        if (value := _try(float, text)) is None:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
        return value
    if kind is str:
        return text
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from error


def _try(kind: Callable[[str], Any], text: str) -> Any | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _read_yaml(path: str, flags: dict[str, argparse.Action]) -> dict[str, Any]:
    """Flag values from a YAML file, each converted exactly as its text would be on the command line."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config {path}{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict | None):
        raise InputError(f"--config {path}: expected lines like 'learning_rate: 1e-5', got a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in (content or {}).items():
        action = flags.get(f"--{key}")
        if action is None or action.nargs == 0 or action.dest == "config":
            known = [name[2:] for name, action in flags.items() if action.nargs != 0 and action.dest != "config"]
            raise InputError(f"--config {path}: unknown key {key!r}{_nearest(str(key), known)}")
        if action.dest in values:
            raise InputError(f"--config {path}: {key!r} sets --{action.dest}, which the file has already set")
        try:
            values[action.dest] = _from_yaml(action, value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--config {path}: {key}: {error}") from error
    return values


def _from_yaml(action: argparse.Action, value: Any) -> Any:
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_from_yaml_scalar(action, item) for item in items]
    return _from_yaml_scalar(action, value)


def _from_yaml_scalar(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, str | int | float):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise argparse.ArgumentTypeError(f"expected a single value, got {found}")
    if isinstance(value, bool) and action.type.args[0] is str:
        raise argparse.ArgumentTypeError(f"expected text, got {value}; put it in quotes")
    return action.type(str(value))


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, [option for option in known if "-" not in option[2:]], n=1)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists all flags" if name.startswith("--") else ""


# --- leaving ---------------------------------------------------------------------------------------------------------


def _stop(message: str, code: int) -> NoReturn:
    """Exit with `code`, and one line on stderr from the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
