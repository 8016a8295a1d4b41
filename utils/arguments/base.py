"""What a flag is: a dataclass field with a help text, a range and further properties.

Blocks of flags subclass `Arguments`; a step's Config inherits from the blocks that it needs. Creating an instance, from
a command line or in Python, checks every value, so that every Config that exists is valid.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from utils.errors import InputError

LARGEST_SEED = 2**32 - 1  # that numpy's generators accept

# Whether a resumed run may change a flag of the run that wrote the checkpoint:
#   same      no: it must have the same value
#   free      yes: it affects nothing that a step computes, or only the number of steps
#   regroup   yes: it only distributes the same rows or weights over processes in another way; the run is then equal in
#             state but not bit-identical
Resume = Literal["same", "free", "regroup"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """The properties of a flag besides its name, type and default; see `flag`."""

    help: str = ""
    aliases: tuple[str, ...] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] = ()
    resume: Resume = "same"
    rows_with: tuple[str, ...] | None = None
    idle: str = ""
    idle_unless: tuple[str, ...] = ()
    needs_gpu: bool = False
    unavailable: str = ""


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    aliases: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    resume: Resume = "same",
    rows_with: Sequence[str] | None = None,
    idle: str = "",
    idle_unless: str | Sequence[str] = (),
    needs_gpu: bool = False,
    unavailable: str = "",
) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required.

    Args:
        default: a list is copied for every instance.
        aliases: further names of the flag, without dashes.
        at_least, above, at_most, below: limits of a number; the first and the third include the limit.
        choices: the allowed values, for a field whose type does not list them.
        resume: whether a resumed run may change it.
        rows_with: for a number of rows: the flags whose product with it and with the number of processes is the rows
            of a step, which must be the same in a resumed run.
        idle: why it never has an effect; a remark says so when it is given.
        idle_unless: conditions on other flags (see `rules._unmet`); it has no effect unless at least one holds.
        needs_gpu: it has no effect without a GPU.
        unavailable: what to use instead; the flag itself is refused.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    known = Flag(
        help=help,
        aliases=tuple(aliases),
        limits={name: limit for name, limit in limits.items() if limit is not None},
        choices=tuple(choices),
        resume=resume,
        rows_with=None if rows_with is None else tuple(rows_with),
        idle=idle,
        idle_unless=(idle_unless,) if isinstance(idle_unless, str) else tuple(idle_unless),
        needs_gpu=needs_gpu,
        unavailable=unavailable,
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"flag": known})
    return dataclasses.field(default=default, metadata={"flag": known})


@dataclasses.dataclass(kw_only=True)
class Arguments:
    """Base of all blocks: checks types, choices and ranges, then runs the `check` of every block.

    A block's `check(self)` validates its flags in combination. It raises `InputError` and does not touch the disk.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            known, value = known_flag(type(self), field.name), getattr(self, field.name)
            _check_type(field.name, types[field.name], known.choices, value)
            _check_limits(field.name, known.limits, value)
        for block in reversed(type(self).__mro__):
            if check := vars(block).get("check"):
                check(self)


def known_flag(config_class: type, name: str) -> Flag:
    """The properties of a field, also where a subclass redeclared it with a bare default."""
    for block in config_class.__mro__:
        field = vars(block).get("__dataclass_fields__", {}).get(name)
        if field is not None and "flag" in field.metadata:
            return field.metadata["flag"]
    return Flag()


def known_flags(config_class: type) -> dict[str, Flag]:
    """`known_flag` of every field, in order."""
    return {field.name: known_flag(config_class, field.name) for field in dataclasses.fields(config_class)}


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def flag_defaults(config_class: type) -> dict[str, Any]:
    """The default of each flag that has one."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
        if not is_required(field)
    }


def _check_type(name: str, expected: Any, choices: Sequence[str], value: Any) -> None:
    """Refuse what would fail late or pass silently: an unknown choice, a single value instead of a list, NaN."""
    if get_origin(expected) is Literal:
        choices = get_args(expected)
    if choices and value not in choices:
        named = ", ".join(str(choice) for choice in choices)
        raise InputError(f"--{name}: unknown choice {value!r}; choose from {named}")
    if get_origin(expected) is list and not isinstance(value, list):
        raise InputError(f"--{name} takes a list, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} must be a finite number, got {value}")


def _check_limits(name: str, limits: Mapping[str, float], value: Any) -> None:
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
