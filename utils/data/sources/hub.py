"""Data sets on the Hugging Face hub: loaded through `datasets`, from its cache where there is no network."""

import contextlib
from typing import TYPE_CHECKING

from utils.errors import InputError
from utils.hub import host, is_reachable, is_switched_off, offline

if TYPE_CHECKING:
    from datasets import Dataset

_PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion, for sets published as a loading script


def load_hub_split(label: str, name: str, hub: str, config: str | None, split: str) -> "Dataset":
    """The rows of `split` of the hub's data set `hub`, which is known here as `name`.

    `label` is the start of error messages: the flag and its value.

    Without a network only the local cache of `datasets` is searched, immediately rather than after its retries (23 s).
    Raises InputError, in one line, with what to do.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    reachable = is_reachable()
    try:
        with contextlib.nullcontext() if reachable else offline():
            try:
                return datasets.load_dataset(hub, config, split=split)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                folder = config or "default"
                return datasets.load_dataset(hub, data_dir=folder, split=split, revision=_PARQUET_BRANCH)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(_failure(label, name, hub, reachable, error)) from error


def _failure(label: str, name: str, hub: str, reachable: bool, error: Exception) -> str:
    if reachable:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{label}: cannot be loaded from the hub ({reason}); check the name, or give a local path"
    cause = "HF_HUB_OFFLINE is set" if is_switched_off() else f"no connection to {host()}"
    return (
        f"{label}: no such local file or folder, and the hub's {hub} is not in the local cache ({cause}); "
        f"download it where there is a network (`hf download --repo-type dataset {hub} --local-dir data/{name}`) and "
        f"give data/{name}, under that name, instead"
    )
