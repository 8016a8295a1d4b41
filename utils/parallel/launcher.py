"""The variables that a launcher sets for its processes, and subprocesses that must not inherit them."""

import os

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "ROLE_RANK"),
)
TORCHELASTIC = "TORCHELASTIC_"  # begins the names of further variables, of torch's launcher


def environment_of_its_own() -> dict[str, str]:
    """This process's environment for a subprocess that is a separate run: without the launcher's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(TORCHELASTIC)
    }
