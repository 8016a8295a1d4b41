"""From a `Corpus` to the two datasets of a step: read, divided, tokenised once and cached as Arrow files."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.data.formats.dialogue import DEFAULT_FORM
from utils.data.formats.example import Example
from utils.data.rows.arrow_rows import EXAMPLES, example_row, open_rows, read_example, row_schema, write_rows
from utils.data.rows.audit import AUDITED, audit
from utils.data.rows.blending import Blend
from utils.data.rows.cache import cached_folder, key_of, private_folder
from utils.data.rows.division import Division, by_source, choose, listed, one_source_after_the_other, set_rows_per_epoch
from utils.data.rows.encoding import ExampleEncoder
from utils.data.rows.filters import without_duplicates
from utils.data.rows.pairing import by_prompt, numbered, pair_batches
from utils.data.rows.report import Part, Tally, counted_rows, tokens_report, total
from utils.data.rows.token_rows import token_rows
from utils.data.rows.tokenization import tokenizer_fingerprint
from utils.data.sources.corpus import Corpus
from utils.data.sources.digests import RememberedDigests
from utils.data.sources.local_files import content_digest
from utils.data.sources.reading import DigestOf, read_examples
from utils.errors import InputError, counted
from utils.parallel import distributed, watchdog

if TYPE_CHECKING:
    import datasets

    from utils.data.rows.streaming import StreamedRows

BATCH = 512
AUDIT_FILE = "audit.arrow"  # the first training examples, beside the rows that were made of them


class TokenDataset(Dataset):
    """Rows of token ids, memory-mapped; see `build_datasets` for their keys.

    With a `blend` these are the rows of one epoch, the first one until `set_epoch` is called.

    Rows with a "group" (`--pairs all`) also have "weight", 1 / number of rows with this group.

    Attributes:
        groups: (rows,) numbers from 0, equal for the pairs of one prompt; None where pairs stand alone.
        description: lines on where the rows come from, how they were divided and what was left out or cut.
        key: a hash of all that the rows depend on: the sources' content and weights, tokenizer, lengths, seed, row
            format.
        report: of the training rows of a step: what `data_report.json` says of them and of the held-out rows.
    """

    def __init__(self, rows: "datasets.Dataset", description: str, key: str, blend: Blend | None = None) -> None:
        self._rows, self._blend = rows, blend
        self._numbers: np.ndarray | None = None  # of the rows in the table, where they are not all of it
        self.description, self.key = description, key
        self.report: dict[str, Any] = {}
        self.groups: np.ndarray | None = None
        if "group" in rows.column_names:
            self.groups = numbered(*(np.asarray(rows.data.column(name)) for name in ("group", "source")))
            self._weights = 1 / np.bincount(self.groups)[self.groups]
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[self.number(index)]
        return row if self.groups is None else row | {"weight": float(self._weights[index])}

    def number(self, index: int) -> int:
        """The number of a row among the rows of all epochs."""
        return int(index if self._numbers is None else self._numbers[index])

    @property
    def has_other_rows(self) -> bool:
        """Whether other epochs have other rows."""
        return self._blend is not None

    def set_epoch(self, epoch: int) -> None:
        """Change to the rows of an epoch, counted from 0. Their number is that of every epoch."""
        if self._blend is not None:
            self._numbers = self._blend.rows_of(epoch)

    def of_all_epochs(self) -> "TokenDataset":
        """The rows of all epochs together."""
        return TokenDataset(self._rows, self.description, self.key)

    def column(self, name: str) -> list[Any]:
        """The values of each row in a column."""
        return self._rows.data.column(name).to_pylist()

    def lengths(self, column: str = "input_ids") -> list[int]:
        """Tokens of each row's `column`, read without the ids."""
        lengths = pc.list_value_length(self._rows.data.column(column))
        return (lengths if self._numbers is None else lengths.take(self._numbers)).to_pylist()

    def head(self, count: int) -> "TokenDataset":
        """The first `count` rows (all of them for 0), which are a fair sample: rows are in random order already."""
        if not count:
            return self
        if self._numbers is None:
            return TokenDataset(self._rows.select(range(min(count, len(self)))), self.description, self.key)
        some = self.of_all_epochs()
        some._numbers = self._numbers[:count]
        return some


def build_datasets(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, is_writer: bool | None = None
) -> "tuple[TokenDataset | StreamedRows, TokenDataset]":
    """The training and the held-out rows of a step.

    Rows are dicts: purpose "sft" {"input_ids", "response_start"}; "preference" {"prompt_ids", "chosen_ids",
    "rejected_ids", "source" (index into `Corpus.names`), "margin" (None without such a column), and with `--pairs all`
    "group" (equal for equal prompts of a source) and "weight"}; "labelled"
    {"prompt_ids", "response_ids", "label"}; "prompts" {"prompt_ids", "prompt" (the text), "reference" (the right
    answer, or None), "columns" (the row's other columns as JSON)}; "pretrain" {"input_ids", "response_start"} in blocks
    of `max_len` ids. Responses end with EOS unless they were cut. If all answers of dialogues are trained, rows of
    purpose "sft" also have "target_spans": the trained spans as [start, end, start, end, ...], or None where the last
    answer is the only one.

    Held out are the files or the split that a source declares as such, else a twentieth of its rows (at least one), the
    same for all steps. The others are divided by `data_split`; rows of `undivided` paths all go to this step, rows for
    "pretrain" are not divided. Several sources are concatenated and shuffled; with `blend_weights` the training rows of
    an epoch are chosen by these, after that division (see `blending`), and the held-out rows are not.

    The training rows of a corpus that is streamed are read and tokenised while training: see `streaming`.

    Args:
        is_writer: whether this process may prepare the data, for which the others wait; if omitted, the first process
            of each machine does.

    Raises:
        InputError: data that cannot be read or used; the message names the file and the line or row, or the flag.
    """
    encoder = ExampleEncoder(tokenizer, system_prompt=corpus.system_prompt, train_on=corpus.train_on)
    least = len(encoder.prefix) + 2
    if corpus.max_len < least:
        raise InputError(f"{corpus.length_flag} {corpus.max_len} is too short for a row; give at least {least}")
    if corpus.streams:
        from utils.data.rows.streaming import stream_datasets  # which needs `TokenDataset`

        return stream_datasets(corpus, encoder)
    cache = private_folder(corpus.cache_dir)
    key = key_of(content_of(corpus, encoder, RememberedDigests(cache)))
    if is_writer is None:
        is_writer = distributed.local_rank() == 0

    def build(folder: Path) -> None:
        _prepare(folder, corpus, encoder)

    folder = cached_folder(cache, key, build, is_writer=is_writer)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = [Division(**division) for division in report["sources"]]
    lines = (source.line(share, corpus) for share, source in zip(corpus.shares, sources, strict=True))
    train, held_out = (open_rows(folder / f"{name}.arrow") for name in ("train", "eval"))
    audited = _audit(folder, corpus, encoder, train)
    description = "\n".join(filter(None, [*lines, report["rows"], audited]))
    blend = None
    if corpus.blend_weights:
        blend = Blend(tuple(source.prepared for source in sources), tuple(source.per_epoch for source in sources))
    rows = TokenDataset(train, description, key, blend)
    rows.report = _data_report(corpus, sources, report.get("data"), description)
    return rows, TokenDataset(held_out, description, key)


def content_of(corpus: Corpus, encoder: ExampleEncoder, digest_of: DigestOf = content_digest) -> dict[str, Any]:
    """All that the rows depend on, as JSON values. `digest_of` gives the digest of a file."""
    content = {
        "purpose": corpus.purpose,
        "shares": [[share.source.fingerprint(digest_of), share.weights, share.part] for share in corpus.shares],
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "forms": [DEFAULT_FORM, corpus.prompt_form, *_form_of_dialogues(corpus, encoder)],
        "max_len": corpus.max_len,
        "seed": corpus.seed,
    }
    if corpus.blend_weights:
        content["blend"] = list(corpus.blend_weights)
    if corpus.number_columns:
        content["number_columns"] = dict(corpus.number_columns)
    if filters := corpus.filters.active():
        content["filters"] = filters
    return content | corpus.pairing


def _audit(folder: Path, corpus: Corpus, encoder: ExampleEncoder, rows: "datasets.Dataset") -> str:
    """Check the first training rows in every run, also where they come from the cache; see `audit`."""
    file = folder / AUDIT_FILE
    if corpus.purpose == "pretrain" or not file.is_file():  # an entry of the cache from before the audit
        return ""
    examples = [example for row in open_rows(file) if (example := read_example(row)) is not None]
    return audit(corpus.purpose, encoder, examples, rows, corpus.max_len, corpus.filters)


def _form_of_dialogues(corpus: Corpus, encoder: ExampleEncoder) -> list[Any]:
    """What determines how dialogues are written and trained, other than by default."""
    template = encoder.template.source if encoder.template else None
    form = [template, corpus.system_prompt, corpus.train_on]
    return [] if form == [None, None, "last"] else form


def _data_report(
    corpus: Corpus, divisions: Sequence[Division], counts: dict[str, Any] | None, description: str
) -> dict[str, Any]:
    """What `data_report.json` says; without `counts`, which rows prepared before there was such a file lack."""
    note = {} if counts else {"note": "the cached rows are from a version that did not count; clear the cache to count"}
    known = counts["sources"] if counts else [{}] * len(divisions)
    sources = [
        division.report(share) | more for share, division, more in zip(corpus.shares, divisions, known, strict=True)
    ]
    rows = {"purpose": corpus.purpose, "longest_row": corpus.max_len, "filters": corpus.filters.active()}
    return rows | note | (counts or {}) | {"sources": sources, "summary": description.splitlines()}


def _names(corpus: Corpus) -> str:
    return ", ".join(share.source.label for share in corpus.shares)


def _prepare(folder: Path, corpus: Corpus, encoder: ExampleEncoder) -> None:
    """Write train.arrow, eval.arrow and report.json into `folder`."""
    repeated: Counter[str] = Counter()
    divisions: list[Division] = []
    tallies = [Tally() for _ in corpus.shares]
    write_rows(folder / "examples.arrow", EXAMPLES, _read_all(corpus, tallies, divisions))
    examples = open_rows(folder / "examples.arrow")
    dropped = total(tally.unusable for tally in tallies)
    prompts = np.asarray(examples.data.column("prompt_number"))
    numbers = choose(corpus, divisions, prompts, dropped, repeated)
    dropped += repeated
    if corpus.filters.deduplicate != "none":
        numbers = _without_duplicates(corpus, examples, numbers, tallies)
    if corpus.makes_pairs:
        sources = np.repeat(np.arange(len(divisions)), [source.train + source.held_out for source in divisions])
        numbers = tuple(by_prompt(some, numbered(prompts, sources)) for some in numbers)
    counts: dict[str, int] = {}
    schema = row_schema(corpus.purpose, corpus.train_on, corpus.pairs)

    def batches_of(indices: np.ndarray, bar: tqdm | None = None, counter: Counter | None = None) -> Iterator:
        batches = _batches(examples, indices, bar)
        return pair_batches(batches, corpus.pairs, counter) if corpus.makes_pairs else batches

    def prepared(name: Part, bar: tqdm, indices: np.ndarray) -> Iterator[dict[str, Any]]:
        batches = batches_of(indices, bar, dropped)
        rows = token_rows(corpus.purpose, encoder, batches, corpus.max_len, tallies, corpus.filters)
        return counted_rows(rows, name, tallies)

    for name, indices in zip(("train", "eval"), numbers, strict=True):
        with tqdm(total=len(indices), desc=f"preparing {name} rows", unit=" rows", delay=3, leave=False) as bar:
            if name == "train" and corpus.blend_weights:
                prepare = functools.partial(prepared, name, bar)
                rows = one_source_after_the_other(indices, divisions, prepare)
            else:
                rows = prepared(name, bar, indices)
            counts[name] = write_rows(folder / f"{name}.arrow", schema, rows)
        filtered, cut, form = (total(getattr(tally, kind) for tally in tallies) for kind in ("filtered", "cut", "form"))
        if not counts[name]:
            what = "training" if name == "train" else "held-out"
            reasons = listed(dropped + filtered + cut + form)
            raise InputError(
                f"{_names(corpus)}: no {what} row is left of {len(indices)} ({reasons}); "
                "give more data, or data that this step can use"
            )
    if corpus.scoring and corpus.makes_pairs and not _has_answers(examples):
        columns = " ".join(corpus.scoring.columns)
        raise InputError(
            f"--score_column {columns} has no effect: no row of {_names(corpus)} holds a single answer; leave it out"
        )
    first = by_source(numbers[0], divisions) if corpus.blend_weights else [numbers[0]]
    audited: Iterator[dict[str, Any]] = (examples[int(index)] for index in np.concatenate(first)[:AUDITED])
    if corpus.makes_pairs:
        made = itertools.chain.from_iterable(batches_of(np.concatenate(first)))
        audited = (example_row(0, pair, corpus.purpose) for pair in itertools.islice(made, AUDITED))
    write_rows(folder / AUDIT_FILE, EXAMPLES, audited)
    (folder / "examples.arrow").unlink()
    training = counted(counts["train"], "training row")
    if corpus.blend_weights:
        set_rows_per_epoch(corpus, divisions)
        training += f", {sum(source.per_epoch for source in divisions)} of them in each epoch,"
    rows = f"{training} and {counted(counts['eval'], 'held-out row')}"
    remarks = {"left out of all rows": dropped, "left out by filters": filtered}
    remarks |= {f"to fit {corpus.max_len} tokens": cut, "form": form}
    for remark, reasons in remarks.items():
        rows += f"; {remark}: {listed(reasons)}" if any(reasons.values()) else ""
    details = {"training_rows": counts["train"], "held_out_rows": counts["eval"], "repeated_prompts": repeated.total()}
    details |= {"tokens": tokens_report(tallies), "sources": [tally.report() for tally in tallies]}
    report = {"sources": [vars(division) for division in divisions], "rows": rows, "data": details}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _read_all(corpus: Corpus, tallies: Sequence[Tally], divisions: list[Division]) -> Iterator[dict[str, Any]]:
    """All examples of all sources; for one that the purpose leaves out, an empty row that keeps its place."""
    filters = corpus.filters
    for source, (share, tally) in enumerate(zip(corpus.shares, tallies, strict=True)):
        sizes = {"train": 0, "held_out": 0}
        for part in sizes if share.source.has_held_out else ("train",):
            examples = read_examples(share.source, part, corpus.purpose, tally.unusable, **corpus.reading)
            for number, example in examples:
                sizes[part] += 1
                if sizes[part] % BATCH == 0:
                    watchdog.working()
                if example is not None and (reason := filters.reason_to_skip(example, corpus.purpose)):
                    tally.unusable[reason] += 1
                    example = None
                if example is not None:
                    numbers = {**example.numbers, "group": number} if corpus.makes_pairs else example.numbers
                    example = replace(example, source=source, numbers=numbers)
                yield example_row(number, example, corpus.purpose)
        divisions.append(Division(**sizes))


def _without_duplicates(
    corpus: Corpus, examples: "datasets.Dataset", numbers: tuple[np.ndarray, np.ndarray], tallies: Sequence[Tally]
) -> tuple[np.ndarray, np.ndarray]:
    """See `filters.without_duplicates`; placeholders are no duplicates of each other."""
    is_usable = pc.or_(*(pc.is_valid(examples.data.column(name)) for name in ("text", "turns"))).to_numpy()
    train, held_out = (indices[is_usable[indices]] for indices in numbers)

    def read(some: np.ndarray) -> list[Example]:
        return _read(examples, some)

    return without_duplicates(train, held_out, read, corpus.purpose, corpus.filters, tallies), held_out


def _read(examples: "datasets.Dataset", numbers: np.ndarray) -> list[Example]:
    """The examples with these numbers, without placeholders."""
    columns = examples[numbers]
    rows = (dict(zip(columns, values)) for values in zip(*columns.values(), strict=True))
    return [example for row in rows if (example := read_example(row)) is not None]


def _batches(examples: "datasets.Dataset", indices: np.ndarray, bar: tqdm | None) -> Iterator[list[Example]]:
    for start in range(0, len(indices), BATCH):
        numbers = indices[start : start + BATCH]
        yield _read(examples, numbers)
        if bar is not None:
            bar.update(len(numbers))
        watchdog.working()


def _has_answers(examples: "datasets.Dataset") -> bool:
    """Whether there are single answers, and not pairs alone."""
    chosen, rejected = (examples.data.column(name) for name in ("chosen", "rejected"))
    return pc.any(pc.and_(pc.is_valid(chosen), pc.is_null(rejected))).as_py()
