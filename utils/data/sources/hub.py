"""Data sets on the Hugging Face hub: loaded through `datasets`, from its cache where there is no network."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import InputError
from utils.hub import host, is_reachable, is_switched_off, offline

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Loaded = TypeVar("Loaded")
_PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion, for sets published as a loading script


def load_hub_split(label: str, name: str, hub: str, config: str | None, split: str) -> "Dataset":
    """The rows of `split` of the hub's data set `hub`, which is known here as `name`.

    `label` is the start of error messages: the flag and its value.

    Without a network only the local cache of `datasets` is searched, immediately rather than after its retries (23 s).
    Raises InputError, in one line, with what to do.
    """
    return _loaded(label, name, hub, lambda: _load(hub, config, split), reachable=is_reachable())


@dataclass(frozen=True)
class HubStream:
    """The rows of a split, read as they are needed.

    identity: changes whenever the rows do. bytes: of the split, None where the hub does not say it.
    """

    rows: "IterableDataset"
    identity: str
    bytes: int | None = None

    @property
    def _fingerprint(self) -> str:
        return self.identity

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def open_hub_stream(label: str, name: str, hub: str, config: str | None, split: str) -> HubStream:
    """The rows of `split`, read over the network at the newest commit; without one, from the local cache.

    Raises InputError as `load_hub_split` does.
    """
    if not is_reachable():
        rows = load_hub_split(label, name, hub, config, split)
        return HubStream(rows.to_iterable_dataset(), rows._fingerprint, rows.data.nbytes)

    def load() -> HubStream:
        import huggingface_hub

        rows = _load(hub, config, split, streaming=True)
        commit = huggingface_hub.HfApi().dataset_info(hub).sha
        size = rows.info.splits[split].num_bytes if rows.info.splits and split in rows.info.splits else None
        return HubStream(rows, f"{config} {commit}", size)

    return _loaded(label, name, hub, load, reachable=True)


def _load(hub: str, config: str | None, split: str, **options: Any) -> "Dataset | IterableDataset":
    import datasets

    try:
        return datasets.load_dataset(hub, config, split=split, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        folder = config or "default"
        return datasets.load_dataset(hub, data_dir=folder, split=split, revision=_PARQUET_BRANCH, **options)


def _loaded(label: str, name: str, hub: str, load: Callable[[], Loaded], *, reachable: bool) -> Loaded:
    """What `load` returns, in offline mode where the hub cannot be reached, with its errors in one line."""
    from datasets.exceptions import DatasetsError

    try:
        with contextlib.nullcontext() if reachable else offline():
            return load()
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
