"""What `--data_path` names: a local file or folder, or a data set of the hub, read as examples.

A local path is looked for first and opens no connection. Every row is converted and checked for what the purpose needs;
one that cannot be used is refused with its file and line, or counted among the dropped ones.
"""

import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from utils.data.example import DroppedRow, Example, NoResponseError, Purpose, RowError, check_usable
from utils.data.hub import is_reachable, load_hub_split
from utils.data.local_files import SUFFIXES, LocatedRow, content_digest, find_files, read_rows
from utils.data.registry import ALIASES, DATASETS, DatasetSpec, Format, expected_columns, find_dataset, find_format
from utils.data.splits import phase_weights
from utils.errors import InputError

Part = Literal["train", "held_out"]
CHECKED_ROWS = 20


class Source(Protocol):
    """Rows in a training part and maybe a held-out part.

    label: the flag and what it was given, for messages. format: None where the rows' columns tell it.
    """

    label: str
    has_held_out: bool
    format: Format | None

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        """Rows that share a format: those of one file, or of one split."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the rows do."""
        ...


@dataclass(frozen=True)
class LocalSource:
    """A file, or a folder whose files are training or held-out files by their names.

    copy_of: the known data set that the folder is a copy of; None: its columns tell how to read it.
    """

    label: str
    training: tuple[Path, ...]
    held_out: tuple[Path, ...]
    copy_of: str | None = None

    @property
    def format(self) -> Format | None:
        return DATASETS[self.copy_of].format if self.copy_of else None

    @property
    def has_held_out(self) -> bool:
        return bool(self.held_out)

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        yield from map(read_rows, self.training if part == "train" else self.held_out)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.copy_of).encode())
        for role, files in (("train", self.training), ("held_out", self.held_out)):
            for file in files:
                content = content_digest(file)
                digest.update(f"{role} {file.name} {content}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, loaded when its rows are first asked for."""

    label: str
    name: str
    hub: str
    config: str | None = None
    train: str = "train"
    held_out: str | None = None
    format: Format | None = None

    @property
    def has_held_out(self) -> bool:
        return self.held_out is not None

    @cached_property
    def _splits(self) -> dict[str, object]:
        names = {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})
        label = self.label + ("" if find_dataset(self.name) else _suggestion(self.name))
        return {part: load_hub_split(label, self.name, self.hub, self.config, split) for part, split in names.items()}

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        split = self.train if part == "train" else self.held_out
        yield ((f"{self.name} ({split}), row {number}", row) for number, row in enumerate(self._splits[part], 1))

    def fingerprint(self) -> str:
        # The name as well: two known sets may be two readings of the same rows (mkqa in two languages).
        return " ".join([self.name, *(f"{part}={split._fingerprint}" for part, split in self._splits.items())])


def open_source(name: str, config: str | None = None, flag: str = "--data_path") -> LocalSource | HubSource:
    """What `name`, given to `flag`, means: a local path if there is one, else a known data set, else a name on the hub.

    `config` chooses among a data set's configurations, which are subfolders in a local copy. Raises InputError for what
    can be none of these.
    """
    path, label = Path(name).expanduser(), f"{flag} {name}"
    if path.exists():
        copy_of = _known_name(path)
        config = config or (DATASETS[copy_of].config if copy_of else None)
        folder = path / config if config and (path / config).is_dir() else path
        training, held_out = find_files(folder, label, left_out=DATASETS[copy_of].left_out if copy_of else "")
        return LocalSource(label, tuple(training), tuple(held_out), copy_of)
    spec = find_dataset(name)
    if spec is None:
        if _looks_local(name):
            raise InputError(f"{label}: no such file or folder{_suggestion(name)}")
        spec = DatasetSpec(name, None)
    if spec.hub is None:
        raise InputError(f"{label}: this set is published as files; fetch {spec.files}, and give their path")
    return HubSource(label, name, spec.hub, config or spec.config, spec.train, spec.held_out, spec.format)


def _known_name(path: Path) -> str | None:
    """The known data set that a folder is called like (.../stanfordnlp/SHP), as a copy from the hub is."""
    location = path.resolve().as_posix() if path.is_dir() else ""
    return next((name for name, spec in DATASETS.items() if spec.hub and location.endswith(f"/{name}")), None)


def _looks_local(name: str) -> bool:
    in_existing_folder = "/" in name and Path(name).expanduser().parent.is_dir()
    return name.startswith((".", "/", "~")) or name.endswith(SUFFIXES) or name.count("/") != 1 or in_existing_folder


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*DATASETS, *ALIASES], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def read_examples(source: Source, part: Part, purpose: Purpose, dropped: Counter[str]) -> Iterator[Example | None]:
    """The examples of one part of a source, in order; reasons for rows left out are counted in `dropped`.

    None stands for an example that this purpose leaves out and another may use: it keeps its place, so that every
    purpose divides the same places. A row that is no example for any purpose is passed over.
    Raises InputError with file and line for a row that cannot be read or lacks what the purpose needs.
    """
    for group in source.groups(part):
        rows = iter(group)
        first = next(rows, None)
        if first is None:
            continue
        row_format = source.format or _recognise(first, purpose)
        lenient = row_format.published or isinstance(source, HubSource)
        for where, example in _convert(itertools.chain([first], rows), row_format, lenient, dropped):
            try:
                check_usable(example, purpose)
                yield example
            except DroppedRow as reason:
                dropped[str(reason)] += 1
                yield None
            except NoResponseError as error:
                if not lenient:
                    raise _refusal(where, error) from error
                dropped["without a response"] += 1
                yield None


def _convert(
    rows: Iterable[LocatedRow], row_format: Format, lenient: bool, dropped: Counter[str]
) -> Iterator[tuple[str, Example]]:
    if row_format.assemble is not None:
        yield from row_format.assemble(rows)
        return
    for where, row in rows:
        try:
            yield where, row_format.convert(row)
        except DroppedRow as reason:
            dropped[str(reason)] += 1
        except NoResponseError as error:
            if not lenient:
                raise _refusal(where, error) from error
            dropped["without a response"] += 1
        except RowError as error:
            raise _refusal(where, error) from error


def _refusal(where: str, error: RowError) -> InputError:
    fix = "; give it one or remove the row" if isinstance(error, NoResponseError) else ""
    return InputError(f"{where}: {error}{fix}")


def _recognise(first: LocatedRow, purpose: Purpose) -> Format:
    where, row = first
    found = find_format(row.keys(), purpose)
    if found is None:
        columns = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{where}: columns found: {columns}; expected for this step one of: {expected_columns(purpose)}"
        )
    return found


def source_flag(purpose: Purpose) -> str:
    """The flag that names the data of `purpose`."""
    return "--unsupervised_dataset_name" if purpose == "pretrain" else "--data_path"


def check_data_paths(
    data_path: Iterable[str],
    *,
    purpose: Purpose,
    data_split: str | None = None,
    sft_only_data_path: Iterable[str] = (),
    config_name: str | None = None,
) -> None:
    """Look at the data before any model is loaded: paths exist, first rows parse and have what `purpose` needs.

    Cheap: the first rows of every file; of a hub data set only whether it can be had at all. Every row is checked by
    `build_datasets`. Raises InputError.
    """
    if data_split is not None:
        phase_weights(data_split, purpose)
    sources = [open_source(name, config_name, source_flag(purpose)) for name in data_path]
    sources += [open_source(name, flag="--sft_only_data_path") for name in sft_only_data_path]
    for source in sources:
        if isinstance(source, HubSource):
            if not is_reachable():
                source.fingerprint()
            continue
        for file in (*source.training, *source.held_out):
            head = read_examples(LocalSource(source.label, (file,), (), source.copy_of), "train", purpose, Counter())
            for _ in itertools.islice(head, CHECKED_ROWS):
                pass
