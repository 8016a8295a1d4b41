"""Data sets on the Hugging Face hub: loaded through `datasets`, from its cache where there is no network."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from utils.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion, for sets published as a loading script


def load_hub_split(label: str, name: str, hub: str, config: str | None, split: str) -> "Dataset":
    """The rows of `split` of the hub's data set `hub`, which is known here as `name`.

    `label` begins messages: the flag and what it was given.

    Without a network only the local cache of `datasets` is searched, at once rather than after its retries (23 s).
    Raises InputError, in one line, with what to do.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    reachable = is_reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
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
    cause = "HF_HUB_OFFLINE is set" if _offline_by_choice() else f"no connection to {_endpoint().hostname}"
    return (
        f"{label}: no such local file or folder, and the hub's {hub} is not in the local cache ({cause}); "
        f"download it where there is a network (`hf download --repo-type dataset {hub} --local-dir data/{name}`) and "
        f"give data/{name}, under that name, instead"
    )


def is_reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub can be asked: not switched off by HF_HUB_OFFLINE, and its host (or a proxy is set) answers."""
    if _offline_by_choice():
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("ALL_PROXY"):
        return True
    endpoint = _endpoint()
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        with socket.create_connection((endpoint.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


def _offline_by_choice() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _endpoint():
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` and `huggingface_hub` look in their caches only, as HF_HUB_OFFLINE=1 at start would."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
