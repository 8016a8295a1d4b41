"""An argparse parser for a Config: one titled group per block, one spelling per flag, errors in plain words."""

import argparse
import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from utils.arguments.base import is_required, known_flag
from utils.errors import InputError

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # argparse does not recognise -1e-5


def build_parser(config_class: type, description: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags of `config_class` and `--config`.

    It raises `argparse.ArgumentError` or `InputError` where argparse would print its usage and exit. For
    argparse no flag is required, because a YAML file may still set it: see `is_required`.
    """
    parser = _Parser(
        usage="%(prog)s [--config FILE.yaml ...] [--flag value ...]",
        description=inspect.cleandoc(description) if description else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = _NEGATIVE_NUMBER
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        nargs="+",
        action="extend",
        help="read flags from YAML files; later files win over earlier ones, and the command line over all of them",
    )
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = get_type_hints(config_class)
    for title, names in flag_groups(config_class):
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, config_class, fields[name], hints[name])
    return parser


def flag_groups(config_class: type) -> Iterator[tuple[str, list[str]]]:
    """Title and flag names per block: the bases of `config_class` in order, then its own additions.

    A flag that `config_class` redeclares, to change its default, stays in the group of its block.
    """
    remaining = [field.name for field in dataclasses.fields(config_class)]
    for block in (*_blocks(config_class), config_class):
        names = [name for name in remaining if name in getattr(block, "__dataclass_fields__", {})]
        remaining = [name for name in remaining if name not in names]
        if names:
            yield (inspect.getdoc(block) or block.__name__).splitlines()[0].rstrip("."), names


def _blocks(config_class: type) -> Iterator[type]:
    """The direct bases; a base with `is_group = False` is replaced by its own bases."""
    for base in config_class.__bases__:
        if vars(base).get("is_group", True):
            yield base
        else:
            yield from _blocks(base)


def flag_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The action of every accepted spelling, such as `--max_seq_len`."""
    return {name: action for action in parser._actions for name in action.option_strings}


def settable_flags(flags: dict[str, argparse.Action]) -> dict[str, argparse.Action]:
    """The flags that a YAML file can set, by name without dashes; not those without a value, such as `--no_x`."""
    return {name[2:]: action for name, action in flags.items() if action.nargs != 0 and action.dest != "config"}


def convert_yaml(action: argparse.Action, value: Any) -> Any:
    """Convert a YAML value to a flag's value like its text on the command line (YAML reads 5e-5 as text, for example).

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling per flag (dashes for underscores are accepted too), and defaults only where they are informative."""

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
        kind = action.type.kind if isinstance(action.type, _Converter) else str
        return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if says_nothing or action.default in ("", []) or action.nargs == 0:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {'on' if default is True else str(default).replace('%', '%%')})"


@dataclasses.dataclass(frozen=True)
class _Converter:
    """Text to a flag's value; an `ArgumentTypeError` says in plain words what was expected."""

    kind: type
    choices: tuple[Any, ...] = ()

    def __call__(self, text: str) -> Any:
        if self.choices:
            named = {str(choice): choice for choice in self.choices}
            if text not in named:
                raise argparse.ArgumentTypeError(
                    f"unknown choice {text!r}; choose from {', '.join(named)}{nearest(text, named)}"
                )
            return named[text]
        try:
            return _convert(self.kind, text)
        except (ValueError, OverflowError) as error:
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise argparse.ArgumentTypeError(f"expected {_EXPECTED[self.kind]}, got {shown!r}") from error


def _convert(kind: Callable[[str], Any], text: str) -> Any:
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(text)
        return text.lower() in _TRUE
    if kind is int and not text.lstrip("+-").isdigit():
        number = float(text)  # 1e3 is a whole number, 1.5 is not
        if not number.is_integer():
            raise ValueError(text)
        return int(number)
    return kind(text)


def _add_flag(group: argparse._ArgumentGroup, config_class: type, field: dataclasses.Field, hint: Any) -> None:
    known, name = known_flag(config_class, field.name), field.name
    kind, choices, is_list = _kind_of(hint)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    options: dict[str, Any] = {
        "default": None if default is dataclasses.MISSING else default,
        "type": _Converter(kind, choices or known.choices),
        "choices": choices or known.choices or None,
        "help": known.help.replace("%", "%%") + (" (required)" if is_required(field) else ""),
    }
    if is_list:
        options["nargs"] = "+"
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    dashes = [f"--{name.replace('_', '-')}"] if "_" in name else []
    group.add_argument(f"--{name}", *dashes, *(f"--{alias}" for alias in known.aliases), **options)
    if kind is bool and default is True:
        group.add_argument(
            f"--no_{name}", f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help=f"turn --{name} off"
        )


def _kind_of(hint: Any) -> tuple[type, tuple[Any, ...], bool]:
    """The type of one value, its choices, and whether the flag takes a list, from `float | None`, `list[str]`, ..."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return type(choices[0]), choices, False
    if get_origin(hint) is list:
        return get_args(hint)[0], (), True
    return hint, (), False


def _convert_yaml_scalar(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, str | int | float):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise argparse.ArgumentTypeError(f"expected a single value, got {found}")
    if isinstance(value, bool) and action.type.kind is str and not action.choices:
        raise argparse.ArgumentTypeError(f"expected text, got {value}; put it in quotes")
    return action.type(str(value))


def split_unknown(argv: Sequence[str], known: Iterable[str]) -> str | None:
    """The first word of `argv` that looks like a flag but is not a known one."""
    names = set(known)
    flags = (word.split("=")[0] for word in argv)
    return next((name for name in flags if name.startswith("--") and name not in names), None)
