"""An argparse parser for a `Config`: one titled group per block, one spelling per flag, errors in plain words."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from utils.arguments.base import field_metadata
from utils.errors import InputError


def build_parser(config_class: type) -> argparse.ArgumentParser:
    """A parser with the flags of `config_class` and `--config`.

    It raises `argparse.ArgumentError` or `InputError` where argparse would print its usage and exit. To argparse no
    flag is required, because a YAML file may still bring it: see `is_required`.
    """
    module = sys.modules.get(config_class.__module__)
    parser = _Parser(
        [_group_view(config_class, title, names) for title, names in flag_groups(config_class)],
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
        description=inspect.getdoc(module) if module else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="read flags from a YAML file; the command line wins over it"
    )
    for action in parser._actions:
        action.required = False
        if isinstance(action, argparse._StoreFalseAction):
            action.help = f"turn --{action.dest} off"
        elif action.type is not None:
            action.type = functools.partial(_convert, action.type, action.choices)
    return parser


def flag_groups(config_class: type) -> Iterator[tuple[str, list[str]]]:
    """Title and flag names per block: the direct bases of `config_class` in order, then its own additions.

    A flag that `config_class` redeclares, to change its default, stays in the group of its block.
    """
    remaining = [field.name for field in dataclasses.fields(config_class)]
    for block in (*config_class.__bases__, config_class):
        names = [name for name in remaining if name in getattr(block, "__dataclass_fields__", {})]
        remaining = [name for name in remaining if name not in names]
        if names:
            yield (inspect.getdoc(block) or block.__name__).splitlines()[0].rstrip("."), names


def flag_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every accepted spelling, such as `--max_seq_len`, and what it sets."""
    return {name: action for action in parser._actions for name in action.option_strings}


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert_yaml(action: argparse.Action, value: Any) -> Any:
    """A YAML value to a flag's value, as its text would be on the command line (YAML reads 5e-5 as text, for one).

    Raises `argparse.ArgumentTypeError`.
    """
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [_convert_yaml_scalar(action, item) for item in (value if isinstance(value, list) else [value])]
    return _convert_yaml_scalar(action, value)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the most similar of the known names, or nothing."""
    spellings = [option for option in known if "-" not in option[2:]]
    matches = difflib.get_close_matches(name, spellings, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling per flag (dashes for underscores are accepted too), and defaults only where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = ", ".join(name for name in action.option_strings if "-" not in name[2:])
        if action.nargs in (0, "?"):
            return spellings
        return f"{spellings} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.choices:
            return "{" + ",".join(map(str, action.choices)) + "}"
        kind = action.type.args[0] if isinstance(action.type, functools.partial) else str
        return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if says_nothing or action.default in ("", []) or action.nargs == 0:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {'on' if default is True else str(default).replace('%', '%%')})"


def _group_view(config_class: type, title: str, names: list[str]) -> type:
    """A dataclass with some of the fields of `config_class`: what `HfArgumentParser` turns into a titled group."""
    types = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    views = []
    for name in names:
        known = field_metadata(config_class, name)
        text = known.get("help", "").replace("%", "%%") + (" (required)" if is_required(fields[name]) else "")
        view = dataclasses.field(
            default=fields[name].default,
            default_factory=fields[name].default_factory,
            metadata={"help": text, "aliases": known.get("aliases", [])},
        )
        views.append((name, types[name], view))
    return dataclasses.make_dataclass("View", views, kw_only=True, namespace={"_argument_group_name": title})


def _convert(kind: Callable[[str], Any], choices: Sequence[Any] | None, text: str) -> Any:
    """Text to a flag's value; an `ArgumentTypeError` says in plain words what was expected."""
    if choices:
        value = kind(text)
        if value not in choices:
            names = [str(choice) for choice in choices]
            raise argparse.ArgumentTypeError(
                f"unknown choice {text!r}; choose from {', '.join(names)}{nearest(text, names)}"
            )
        return value
    try:
        if kind is int and not text.lstrip("+-").isdigit():
            number = float(text)  # 1e3 is a whole number, 1.5 is not
            if not number.is_integer():
                raise ValueError(text)
            return int(number)
        return kind(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        expected = {int: "a whole number", float: "a number"}.get(kind, "true or false")
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from error


def _convert_yaml_scalar(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, str | int | float):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise argparse.ArgumentTypeError(f"expected a single value, got {found}")
    if isinstance(value, bool) and action.type.args[0] is str:
        raise argparse.ArgumentTypeError(f"expected text, got {value}; put it in quotes")
    return action.type(str(value))
