"""What `--data_path` names: a local file or folder, or a data set on the hub, read as examples.

A local path is looked for first and opens no connection. Every row is converted and checked for what the purpose needs;
one that cannot be used is refused with its file and line, or counted among the dropped ones.
"""

import dataclasses
import difflib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from utils.data.formats.converters import number_in
from utils.data.formats.dialogue import form_of, has_own_marker, prompt_number, settled
from utils.data.formats.example import (
    DroppedRow,
    Example,
    NoResponseError,
    PromptForm,
    Purpose,
    Row,
    RowError,
    check_usable,
)
from utils.data.formats.registry import (
    ALIASES,
    DATASETS,
    SPELLINGS,
    DatasetSpec,
    Format,
    expected_columns,
    find_answer_format,
    find_dataset,
    find_format,
)
from utils.data.sources.hub import HubStream, load_hub_split, open_hub_stream
from utils.data.sources.local_files import (
    SUFFIXES,
    LocatedRow,
    content_digest,
    find_files,
    read_rows,
    sampled_digest,
)
from utils.data.sources.scoring import Scoring, refuse_pairs
from utils.errors import InputError
from utils.hub import looks_local

Part = Literal["train", "held_out"]
DigestOf = Callable[[Path], str]
SETTLING_ROWS = 200  # of a data set, from which the form of its prompts is determined


class Source(Protocol):
    """Rows in a training part and maybe a held-out part.

    label: the flag and its value, for messages. format: None where the rows' columns determine it. remark: what the log
    adds about the source, empty for nothing. streams: its rows are read while training.
    """

    label: str
    has_held_out: bool
    format: Format | None
    remark: str
    streams: bool

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        """Rows that share a format: those of one file, or of one split."""
        ...

    def fingerprint(self, digest_of: DigestOf = content_digest) -> str:
        """Changes whenever the rows do. `digest_of` gives the digest of a file."""
        ...


@dataclass(frozen=True)
class LocalSource:
    """A file, or a folder whose files are for training or held out according to their names.

    copy_of: the known data set that the folder is a copy of; None: the columns determine how to read it.
    others: files of the folder that are not read.
    streams: whether its training files may be too large to be read before training.
    """

    label: str
    training: tuple[Path, ...]
    held_out: tuple[Path, ...]
    copy_of: str | None = None
    others: tuple[Path, ...] = ()
    streams: bool = False

    @property
    def format(self) -> Format | None:
        return DATASETS[self.copy_of].format if self.copy_of else None

    @property
    def has_held_out(self) -> bool:
        return bool(self.held_out)

    @property
    def remark(self) -> str:
        if not self.others:
            return ""
        names = ", ".join(file.name for file in self.others[:3])
        return f"; not read: {names}" + (f" and {len(self.others) - 3} more" if len(self.others) > 3 else "")

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        yield from map(read_rows, self.training if part == "train" else self.held_out)

    def fingerprint(self, digest_of: DigestOf = content_digest) -> str:
        digest = hashlib.sha256(str(self.copy_of).encode())
        if self.streams:
            digest_of = sampled_digest
        for role, files in (("train", self.training), ("held_out", self.held_out)):
            for file in files:
                content = digest_of(file)
                digest.update(f"{role} {file.name} {content}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, loaded when its rows are first requested.

    streams: its rows are read over the network while they are needed, or from the local cache where there is none.
    """

    label: str
    name: str
    hub: str
    config: str | None = None
    train: str = "train"
    held_out: str | None = None
    format: Format | None = None
    streams: bool = False
    remark = ""

    @property
    def has_held_out(self) -> bool:
        return self.held_out is not None

    @cached_property
    def _splits(self) -> dict[str, object]:
        names = {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})
        label = self.label + ("" if find_dataset(self.name) else _suggestion(self.name))
        load = open_hub_stream if self.streams else load_hub_split
        return {part: load(label, self.name, self.hub, self.config, split) for part, split in names.items()}

    def stream(self, part: Part) -> HubStream:
        """The rows of a part, to be read one after the other from any place on; of a source that `streams`."""
        return self._splits[part]

    def location(self, part: Part, number: int) -> str:
        """Where the row of this number is, counted from 1."""
        return f"{self.name} ({self.train if part == 'train' else self.held_out}), row {number}"

    def groups(self, part: Part) -> Iterator[Iterable[LocatedRow]]:
        yield ((self.location(part, number), row) for number, row in enumerate(self._splits[part], 1))

    def fingerprint(self, digest_of: DigestOf = content_digest) -> str:
        # The name as well: two known sets may be two readings of the same rows (mkqa in two languages).
        return " ".join([self.name, *(f"{part}={split._fingerprint}" for part, split in self._splits.items())])


def open_source(
    name: str, config: str | None = None, flag: str = "--data_path", *, streams: bool = False
) -> LocalSource | HubSource:
    """What `name`, given to `flag`, means: a local path if there is one, else a known data set, else a name on the hub.

    Names of known sets match in whatever case. `config` chooses among a data set's configurations, which are subfolders
    in a local copy. Raises InputError for a name that is none of these.
    """
    path, label = Path(name).expanduser(), f"{flag} {name}"
    if path.exists():
        copy_of = _known_name(path)
        config = config or (DATASETS[copy_of].config if copy_of else None)
        folder = path / config if config and (path / config).is_dir() else path
        training, held_out, others = find_files(folder, label, left_out=DATASETS[copy_of].left_out if copy_of else ())
        return LocalSource(label, tuple(training), tuple(held_out), copy_of, tuple(others), streams)
    spec = find_dataset(name)
    if spec is None:
        if looks_local(name, SUFFIXES) or "/" not in name:
            raise InputError(f"{label}: no such file or folder{_suggestion(name)}")
        spec = DatasetSpec(name, None)
    if spec.hub is None:
        raise InputError(f"{label}: this set is published as files; fetch {spec.files}, and give their path")
    name = SPELLINGS.get(name.lower(), name)
    return HubSource(label, name, spec.hub, config or spec.config, spec.train, spec.held_out, spec.format, streams)


def _known_name(path: Path) -> str | None:
    """The known data set after which a folder is named (.../stanfordnlp/SHP), as a copy from the hub is."""
    location = path.resolve().as_posix().lower() if path.is_dir() else ""
    named = (name for lower, name in SPELLINGS.items() if location.endswith(f"/{lower}"))
    known = (ALIASES.get(name, name) for name in named)
    return next((name for name in known if DATASETS[name].hub), None)


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), SPELLINGS, n=1)
    return f" (did you mean {SPELLINGS[close[0]]}?)" if close else ""


def read_examples(
    source: Source,
    part: Part,
    purpose: Purpose,
    dropped: Counter[str],
    prompt_form: str = "auto",
    number_columns: Mapping[str, str] | None = None,
    scoring: Scoring | None = None,
    *,
    skip_empty: bool = False,
) -> Iterator[tuple[int, Example | None]]:
    """The examples of one part of a source, in order, each with the number of its prompt (`prompt_number`).

    Reasons for rows left out are counted in `dropped`. None stands for an example that this purpose leaves out and
    another may use: it keeps its place, so that every purpose divides the same places. A row that is no example for any
    purpose is left out altogether.

    Args:
        prompt_form: of prompts that are text: "raw", "dialogue", or "auto" for the form of the first ones (`form_of`),
            except that then a prompt that ends with "Assistant:" is always raw.
        number_columns: numbers to read from each row, by their name in `Example.numbers`: the column that holds them.
        skip_empty: leave out rows without a response in files of the user's own too, where they are an error otherwise.

        scoring: for rows of single answers, which then serve the purposes "preference" and "labelled" as well.

    Raises InputError with file and line for a row that cannot be read or lacks what the purpose needs.
    """
    form = settled_form(source, purpose, prompt_form, skip_empty=skip_empty, scoring=scoring)
    for group in source.groups(part):
        yield from read_group(
            group,
            source,
            purpose,
            dropped,
            form,
            prompt_form=prompt_form,
            number_columns=number_columns,
            scoring=scoring,
            skip_empty=skip_empty,
        )


def settled_form(
    source: Source, purpose: Purpose, prompt_form: str, *, skip_empty: bool = False, scoring: Scoring | None = None
) -> PromptForm:
    """The form of the source's prompts that are text: what `prompt_form` says, "auto" by its first prompts."""
    return form_of(_first_prompts(source, purpose, skip_empty, scoring)) if prompt_form == "auto" else prompt_form


def read_group(
    group: Iterable[LocatedRow],
    source: Source,
    purpose: Purpose,
    dropped: Counter[str],
    form: PromptForm,
    *,
    prompt_form: str = "auto",
    number_columns: Mapping[str, str] | None = None,
    scoring: Scoring | None = None,
    skip_empty: bool = False,
    first: LocatedRow | None = None,
) -> Iterator[tuple[int, Example | None]]:
    """`read_examples` of the rows of one group. Each is converted before the next one is read.

    Args:
        form: of the source's prompts, see `settled_form`.
        first: the first row of the group, which determines its format, where the rows to read begin after it.
    """
    for where, example, published in _examples(group, source, purpose, dropped, skip_empty, scoring, first):
        is_raw = prompt_form == "auto" and example.is_undecided and has_own_marker(example.prompt)
        example = settled(example, "raw" if is_raw else form)
        example = dataclasses.replace(example, where=where, published=published)
        number = prompt_number(example)
        try:
            if scoring:
                example = scoring.scored(example, purpose)
            check_usable(example, "sft" if scoring and scoring.is_answer(example) else purpose)
            yield number, _with_numbers(example, number_columns, where) if number_columns else example
        except DroppedRow as reason:
            dropped[str(reason)] += 1
            yield number, None
        except NoResponseError as error:
            if not (published or skip_empty):
                raise _refusal(where, error) from error
            dropped["without a response"] += 1
            yield number, None


def _first_prompts(source: Source, purpose: Purpose, skip_empty: bool, scoring: Scoring | None) -> list[str]:
    """The first prompts that are text of undecided form."""
    group = next(iter(source.groups("train")), ())
    examples = (example for _, example, _ in _examples(group, source, purpose, Counter(), skip_empty, scoring))
    return [example.prompt for example in itertools.islice(examples, SETTLING_ROWS) if example.is_undecided]


def _examples(
    group: Iterable[LocatedRow],
    source: Source,
    purpose: Purpose,
    dropped: Counter[str],
    skip_empty: bool,
    scoring: Scoring | None,
    first: LocatedRow | None = None,
) -> Iterator[tuple[str, Example, bool]]:
    """(where, example, whether it is of a published set) of the rows of a group."""
    rows = iter(group)
    if first is None:
        first = next(rows, None)
        if first is None:
            return
        rows = itertools.chain([first], rows)
    row_format = source.format or _recognise(first, purpose, scoring)
    if source.streams and row_format.assemble is not None:
        raise InputError(
            f"{source.label}: its rows are messages, from which examples are put together once all are read; "
            "--streaming cannot do that: leave it out, or leave this set out"
        )
    if purpose not in row_format.serves and not (scoring and row_format.holds_answers):
        if row_format.holds_answers and purpose in ("preference", "labelled"):
            raise InputError(
                f"{source.label}: this data set holds single answers; name the column of their scores with "
                f"--score_column{' and --score_threshold' if purpose == 'labelled' else ''}, or another data set"
            )
        kind = {"preference": "pairs of answers", "labelled": "answers with a label"}.get(purpose, "rows for this step")
        raise InputError(f"{source.label}: this data set holds no {kind}; name another one")
    if scoring and not row_format.holds_answers:
        refuse_pairs(scoring, first)
    published = row_format.published or isinstance(source, HubSource)
    for where, example in _convert(rows, row_format, published or skip_empty, dropped):
        _refuse_lone_surrogates(example, where)
        yield where, example, published


def _convert(
    rows: Iterable[LocatedRow], row_format: Format, lenient: bool, dropped: Counter[str]
) -> Iterator[tuple[str, Example]]:
    if row_format.assemble is not None:
        yield from row_format.assemble(rows)
        return
    for where, row in rows:
        try:
            yield where, _with_other_columns(row_format.convert(row), row, row_format)
        except DroppedRow as reason:
            dropped[str(reason)] += 1
        except NoResponseError as error:
            if not lenient:
                raise _refusal(where, error) from error
            dropped["without a response"] += 1
        except RowError as error:
            raise _refusal(where, error) from error


def _refuse_lone_surrogates(example: Example, where: str) -> None:
    """JSON can hold half of a UTF-16 surrogate pair ("\\ud83d"), which neither UTF-8 nor a tokenizer can represent."""
    turns = [example.prompt] if isinstance(example.prompt, str) else [text for _, text in example.prompt]
    answers = (example.chosen, example.rejected, *(text for text, _ in example.ranked))
    for text in filter(None, (*turns, *answers, example.reference)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start].encode("ascii", "backslashreplace").decode()
            before = text[max(error.start - 20, 0) : error.start]
            raise InputError(
                f"{where}: the text {before!r} continues with {half}, half of a character; fix the row or remove it"
            ) from error


def _with_other_columns(example: Example, row: Row, row_format: Format) -> Example:
    """`example` with the other columns of its row: a score, a reference answer, and whatever the format ignores."""
    others = {name: value for name, value in row.items() if name not in row_format.columns}
    score, reference = others.get("score"), others.get("reference")
    return dataclasses.replace(
        example,
        score=float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None,
        reference=reference if isinstance(reference, str) else None,
        columns=others,
    )


def _with_numbers(example: Example, columns: Mapping[str, str], where: str) -> Example:
    """`example` with the numbers in `columns`. Raises InputError for a row without one."""
    numbers = {}
    for name, column in columns.items():
        if column not in example.columns:
            raise InputError(f"{where}: has no column `{column}`, which --{name}_column names; add it to every row")
        try:
            numbers[name] = number_in(example.columns, column)
        except RowError as error:
            raise InputError(f"{where}: {error}; --{name}_column needs one in every row") from error
        if not math.isfinite(numbers[name]) or isinstance(example.columns[column], bool):
            raise InputError(
                f"{where}: `{column}` is {example.columns[column]}; --{name}_column needs a finite number in every row"
            )
    return dataclasses.replace(example, numbers=numbers)


def _refusal(where: str, error: RowError) -> InputError:
    fix = "; give it one or remove the row" if isinstance(error, NoResponseError) else ""
    return InputError(f"{where}: {error}{fix}")


def _refuse_other_kind(where: str, row: Row, purpose: Purpose) -> None:
    """Say which loss reads the rows, where pairs are expected and single answers found, or the other way round."""
    if purpose == "labelled" and "label" not in row and find_format(row.keys(), "preference"):
        raise InputError(
            f"{where}: the row holds a pair of answers, and --loss kto reads single ones with a `label`; use --loss "
            "kto_pair, or another loss of pairs"
        )
    is_single = "label" in row and find_format(row.keys(), "labelled")
    if purpose == "preference" and is_single and not find_format(row.keys(), "preference"):
        raise InputError(
            f"{where}: the row holds a single answer with a `label`, and pairs are expected; direct preference "
            "optimisation reads such rows with --loss kto"
        )


def _recognise(first: LocatedRow, purpose: Purpose, scoring: Scoring | None) -> Format:
    where, row = first
    found = find_format(row.keys(), "preference" if scoring else purpose)
    if scoring:
        found = found or find_answer_format(row.keys())
    else:
        _refuse_other_kind(where, row, purpose)
    if found is None:
        columns = ", ".join(map(str, row)) or "none"
        hint = ""
        if purpose in ("preference", "labelled") and find_answer_format(row.keys()):
            hint = "; for rows of one answer, name the column of its score with --score_column"
        raise InputError(
            f"{where}: columns found: {columns}; expected for this step one of: {expected_columns(purpose)}{hint}"
        )
    return found
