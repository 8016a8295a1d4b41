"""What a flag is: a dataclass field with a help text, a range and, at times, a second name.

Blocks of flags subclass `Arguments`; a step's `Config` inherits from the blocks that it needs. Making an instance, from
a command line or in Python, checks every value, so that a `Config` that exists is a `Config` that makes sense.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArg

from utils.errors import InputError


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    aliases: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required.

    `at_least` and `at_most` include the limit, `above` and `below` do not. `aliases` are further flag names, without
    dashes. A list as `default` is copied for every instance.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"limits": {name: limit for name, limit in limits.items() if limit is not None}}
    options = {"aliases": [f"--{alias}" for alias in aliases], "help": help, "metadata": metadata}
    if isinstance(default, list):
        return HfArg(default_factory=lambda: list(default), **options)
    return HfArg(default=default, **options)


@dataclasses.dataclass(kw_only=True)
class Arguments:
    """Base of all blocks: checks types, choices and ranges, then runs the `check` of every block.

    A block's `check(self)` validates what its flags mean together. It raises `InputError` and touches no disk.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, types[field.name], value)
            _check_limits(field.name, field_metadata(type(self), field.name).get("limits", {}), value)
        for block in reversed(type(self).__mro__):
            if check := vars(block).get("check"):
                check(self)


def field_metadata(config_class: type, name: str) -> dict[str, Any]:
    """Help, aliases and limits of a field, also where a subclass redeclared it with a bare default."""
    for block in config_class.__mro__:
        field = vars(block).get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return dict(field.metadata)
    return {}


def _check_type(name: str, expected: Any, value: Any) -> None:
    """Refuse what would fail late or pass in silence: a wrong choice, one text where a list belongs, NaN."""
    if get_origin(expected) is Literal and value not in get_args(expected):
        choices = ", ".join(str(choice) for choice in get_args(expected))
        raise InputError(f"--{name}: unknown choice {value!r}; choose from {choices}")
    if get_origin(expected) is list and not isinstance(value, list):
        raise InputError(f"--{name} takes a list, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} must be a finite number, got {value}")


def _check_limits(name: str, limits: dict[str, float], value: Any) -> None:
    if value is None:
        return
    tests = {
        "at_least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "at_most": lambda limit: value <= limit,
        "below": lambda limit: value < limit,
    }
    for kind, limit in limits.items():
        if not tests[kind](limit):
            raise InputError(f"--{name} must be {kind.replace('_', ' ')} {limit}, got {value}")
