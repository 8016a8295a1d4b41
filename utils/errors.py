"""Exceptions that end a run on purpose, and a helper for the wording of messages.

`utils.arguments.run.run` turns the errors into one line on stderr and an exit code.
"""


class InputError(ValueError):
    """The user's input cannot work: a flag, a file or a folder. The message names it and the fix. Exit code 2."""


class RankError(InputError):
    """An `InputError` that one process alone meets while the others wait for it: it prints the error with its rank."""


class DoesNotFit(RuntimeError):
    """`--dry_run` or `estimate_memory.py`: the run needs more memory than a process has. Exit code 4."""


class DivergenceError(RuntimeError):
    """Training produced NaN or infinity. The message names the step, the likely cause and the flags. Exit code 3."""


class RunStopped(RuntimeError):
    """A signal asked the run to stop: it finished the current step, saved it and stopped. Exit code 75."""


def counted(count: int, noun: str) -> str:
    """A number with the noun that it counts: "1 row", "2 rows"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
