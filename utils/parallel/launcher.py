"""What a launcher tells its processes through the environment, and processes that it has nothing to tell."""

import os

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_of_its_own() -> dict[str, str]:
    """This process's environment for one that is a run of its own, whatever launched this process."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
