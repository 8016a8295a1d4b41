"""From a `Corpus` to the two datasets of a step: read, divided, tokenised once and cached as Arrow files."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from utils.data.rows.blending import Blend, rows_per_epoch
from utils.data.rows.cache import cached_folder, key_of, private_folder
from utils.data.rows.encoding import ExampleEncoder
from utils.data.rows.token_rows import ABOUT_FORM, token_rows
from utils.data.rows.tokenization import tokenizer_fingerprint
from utils.data.sources.corpus import Corpus, Share
from utils.data.sources.reading import read_examples
from utils.data.sources.splits import divide
from utils.errors import InputError, counted
from utils.parallel import distributed, watchdog

if TYPE_CHECKING:
    import datasets

BATCH = 512
AUDIT_FILE = "audit.arrow"  # the first training examples, beside the rows that were made of them
HELD_OUT_SHARE = 0.05  # of the rows of a source that comes without held-out rows


class TokenDataset(Dataset):
    """Rows of token ids, memory-mapped; see `build_datasets` for their keys.

    With a `blend` these are the rows of one epoch, the first one until `set_epoch` is called.

    Attributes:
        description: lines on where the rows come from, how they were divided and what was left out or cut.
        key: a hash of all that the rows depend on: the sources' content and weights, tokenizer, lengths, seed, row
            format.
    """

    def __init__(self, rows: "datasets.Dataset", description: str, key: str, blend: Blend | None = None) -> None:
        self._rows, self._blend = rows, blend
        self._numbers: np.ndarray | None = None  # of the rows in the table, where they are not all of it
        self.description, self.key = description, key
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[self.number(index)]

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
) -> tuple[TokenDataset, TokenDataset]:
    """The training and the held-out rows of a step.

    Rows are dicts: purpose "sft" {"input_ids", "response_start"}; "preference" {"prompt_ids", "chosen_ids",
    "rejected_ids", "source" (index into `Corpus.names`), "margin" (None without such a column)}; "labelled"
    {"prompt_ids", "response_ids", "label"}; "prompts" {"prompt_ids", "prompt" (the text), "reference" (the right
    answer, or None), "columns" (the row's other columns as JSON)}; "pretrain" {"input_ids", "response_start"} in blocks
    of `max_len` ids. Responses end with EOS unless they were cut. If all answers of dialogues are trained, rows of
    purpose "sft" also have "target_spans": the trained spans as [start, end, start, end, ...], or None where the last
    answer is the only one.

    Held out are the files or the split that a source declares as such, else a twentieth of its rows (at least one), the
    same for all steps. The others are divided by `data_split`; rows of `undivided` paths all go to this step, rows for
    "pretrain" are not divided. Several sources are concatenated and shuffled; with `blend_weights` the training rows of
    an epoch are chosen by these, after that division (see `blending`), and the held-out rows are not.

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
    content = {
        "purpose": corpus.purpose,
        "shares": [[share.source.fingerprint(), share.weights, share.part] for share in corpus.shares],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "forms": [DEFAULT_FORM, corpus.prompt_form, *_form_of_dialogues(corpus, encoder)],
        "max_len": corpus.max_len,
        "seed": corpus.seed,
    }
    if corpus.blend_weights:
        content["blend"] = list(corpus.blend_weights)
    if corpus.number_columns:
        content["number_columns"] = dict(corpus.number_columns)
    key = key_of(content)
    if is_writer is None:
        is_writer = distributed.local_rank() == 0

    def build(folder: Path) -> None:
        _prepare(folder, corpus, encoder)

    folder = cached_folder(private_folder(corpus.cache_dir), key, build, is_writer=is_writer)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = [_Division(**division) for division in report["sources"]]
    lines = (source.line(share, corpus) for share, source in zip(corpus.shares, sources, strict=True))
    train, held_out = (open_rows(folder / f"{name}.arrow") for name in ("train", "eval"))
    audited = _audit(folder, corpus, encoder, train)
    description = "\n".join(filter(None, [*lines, report["rows"], audited]))
    blend = None
    if corpus.blend_weights:
        blend = Blend(tuple(source.prepared for source in sources), tuple(source.per_epoch for source in sources))
    return TokenDataset(train, description, key, blend), TokenDataset(held_out, description, key)


def _audit(folder: Path, corpus: Corpus, encoder: ExampleEncoder, rows: "datasets.Dataset") -> str:
    """Check the first training rows in every run, also where they come from the cache; see `audit`."""
    file = folder / AUDIT_FILE
    if corpus.purpose == "pretrain" or not file.is_file():  # an entry of the cache from before the audit
        return ""
    examples = [example for row in open_rows(file) if (example := read_example(row)) is not None]
    return audit(corpus.purpose, encoder, examples, rows, corpus.max_len)


def _form_of_dialogues(corpus: Corpus, encoder: ExampleEncoder) -> list[Any]:
    """What determines how dialogues are written and trained, other than by default."""
    template = encoder.template.source if encoder.template else None
    form = [template, corpus.system_prompt, corpus.train_on]
    return [] if form == [None, None, "last"] else form


def _names(corpus: Corpus) -> str:
    return ", ".join(share.source.label for share in corpus.shares)


@dataclass
class _Division:
    """How the rows of a source were divided: `parts` counts the `train` rows held out, then those of each step.

    With weights: how many training rows were prepared for this step, and how many an epoch has.
    """

    train: int
    held_out: int
    parts: list[int] = field(default_factory=list)
    prepared: int = 0
    per_epoch: int = 0

    def line(self, share: Share, corpus: Corpus) -> str:
        """The line about it in the log."""
        mine = self.parts[1 + share.part]
        text = f"{share.source.label}: {counted(self.train + self.held_out, 'row')}, "
        text += f"{self.held_out or self.parts[0]} held out"
        if mine < self.train - self.parts[0]:
            others = ", ".join(
                f"{count} to step {step}"
                for step, count in enumerate(self.parts[1:], 1)
                if count and step != share.part + 1
            )
            text += f"; --data_split {corpus.data_split} gives {mine} to this step, {others}"
        if share.blend_weight is not None:
            text += f"; weight {share.blend_weight:g}: {self.per_epoch} of {self.prepared} training rows in each epoch"
        return text + share.source.remark


def _prepare(folder: Path, corpus: Corpus, encoder: ExampleEncoder) -> None:
    """Write train.arrow, eval.arrow and report.json into `folder`."""
    dropped: Counter[str] = Counter()
    divisions: list[_Division] = []
    write_rows(folder / "examples.arrow", EXAMPLES, _read_all(corpus, dropped, divisions))
    examples = open_rows(folder / "examples.arrow")
    numbers = _choose(corpus, divisions, np.asarray(examples.data.column("prompt_number")), dropped)
    counts: dict[str, int] = {}
    cut: Counter[str] = Counter()

    def prepared(indices: np.ndarray, bar: tqdm) -> Iterator[dict[str, Any]]:
        batches = _batches(examples, indices, bar)
        return token_rows(corpus.purpose, encoder, batches, corpus.max_len, cut)

    for name, indices in zip(("train", "eval"), numbers, strict=True):
        with tqdm(total=len(indices), desc=f"preparing {name} rows", unit=" rows", delay=3, leave=False) as bar:
            if name == "train" and corpus.blend_weights:
                rows = _one_source_after_the_other(indices, divisions, lambda some, bar=bar: prepared(some, bar))
            else:
                rows = prepared(indices, bar)
            counts[name] = write_rows(folder / f"{name}.arrow", row_schema(corpus.purpose, corpus.train_on), rows)
        if not counts[name]:
            what = "training" if name == "train" else "held-out"
            raise InputError(
                f"{_names(corpus)}: no {what} row is left of {len(indices)} ({_list(dropped + cut)}); "
                "give more data, or data that this step can use"
            )
    first = _by_source(numbers[0], divisions) if corpus.blend_weights else [numbers[0]]
    audited = np.concatenate(first)[:AUDITED]
    write_rows(folder / AUDIT_FILE, EXAMPLES, (examples[int(index)] for index in audited))
    (folder / "examples.arrow").unlink()
    training = counted(counts["train"], "training row")
    if corpus.blend_weights:
        _set_rows_per_epoch(corpus, divisions)
        training += f", {sum(source.per_epoch for source in divisions)} of them in each epoch,"
    rows = f"{training} and {counted(counts['eval'], 'held-out row')}"
    form = Counter({reason: count for reason, count in cut.items() if reason.startswith(ABOUT_FORM)})
    remarks = (("left out of all rows", dropped), (f"to fit {corpus.max_len} tokens", cut - form), ("form", form))
    for remark, reasons in remarks:
        rows += f"; {remark}: {_list(reasons)}" if any(reasons.values()) else ""
    report = {"sources": [vars(division) for division in divisions], "rows": rows}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _read_all(corpus: Corpus, dropped: Counter[str], divisions: list[_Division]) -> Iterator[dict[str, Any]]:
    """All examples of all sources; for one that the purpose leaves out, an empty row that keeps its place."""
    for source, share in enumerate(corpus.shares):
        sizes = {"train": 0, "held_out": 0}
        for part in sizes if share.source.has_held_out else ("train",):
            for number, example in read_examples(
                share.source, part, corpus.purpose, dropped, corpus.prompt_form, corpus.number_columns
            ):
                sizes[part] += 1
                if sizes[part] % BATCH == 0:
                    watchdog.working()
                if example is not None and corpus.purpose == "preference":
                    example = replace(example, numbers={**example.numbers, "source": source})
                yield example_row(number, example, corpus.purpose)
        divisions.append(_Division(**sizes))


def _choose(
    corpus: Corpus, divisions: Sequence[_Division], prompts: np.ndarray, dropped: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on and to hold out, over all sources, shuffled.

    Purpose "prompts" keeps one row for each distinct prompt; repeats are counted in `dropped`.
    """
    train, held_out, start, known = [], [], 0, {}
    for share, source in zip(corpus.shares, divisions, strict=True):
        own_rows = prompts[start : start + source.train]
        held_out_share = 0.0 if source.held_out else HELD_OUT_SHARE
        others = known if len(share.weights) > 1 else None  # a source that is not divided takes all of its rows
        try:
            kept, *parts = divide(
                own_rows, share.weights, seed=corpus.seed, held_out_share=held_out_share, known=others
            )
        except ValueError as error:
            remarks = f" ({_list(dropped)})" if any(dropped.values()) else ""
            raise InputError(
                f"{share.source.label}: {counted(len(np.unique(own_rows)), 'prompt')} in "
                f"{counted(source.train, 'usable row')}{remarks} are too few: one is held out and every part of "
                "--data_split needs one; give more data, or 0 for the parts that are not needed"
            ) from error
        source.parts = [len(kept), *map(len, parts)]
        behind = start + source.train
        train.append(start + parts[share.part])
        held_out.append(np.concatenate([start + kept, behind + np.arange(source.held_out)]))
        start = behind + source.held_out
    shuffle = np.random.RandomState(corpus.seed)
    chosen = [shuffle.permutation(np.concatenate(numbers)) for numbers in (train, held_out)]
    if corpus.purpose == "prompts":
        chosen = [_distinct(numbers, prompts, dropped) for numbers in chosen]
    return chosen[0], chosen[1]


def _one_source_after_the_other(
    numbers: np.ndarray, divisions: Sequence[_Division], prepare: Callable[[np.ndarray], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The prepared rows of the examples with these numbers, by source, each in the given order; counted in it."""
    for source, own in zip(divisions, _by_source(numbers, divisions), strict=True):
        for row in prepare(own):
            source.prepared += 1
            yield row


def _by_source(numbers: np.ndarray, divisions: Sequence[_Division]) -> list[np.ndarray]:
    """The numbers of each source's examples, in the given order."""
    ends = np.cumsum([source.train + source.held_out for source in divisions])
    owners = np.searchsorted(ends, numbers, side="right")
    return [numbers[owners == place] for place in range(len(divisions))]


def _set_rows_per_epoch(corpus: Corpus, divisions: Sequence[_Division]) -> None:
    """Raises InputError for a source with a weight and without a row."""
    weighted = []
    for share, source in zip(corpus.shares, divisions, strict=True):
        source.per_epoch = source.prepared
        if share.blend_weight is not None:
            weighted.append((source, share.blend_weight))
            if not source.prepared:
                raise InputError(
                    f"{share.source.label}: has a weight of {share.blend_weight:g}, but no training row for this step; "
                    "leave it out, or give more data"
                )
    sources, weights = zip(*weighted, strict=True)
    for source, rows in zip(sources, rows_per_epoch([source.prepared for source in sources], weights), strict=True):
        source.per_epoch = rows


def _distinct(numbers: np.ndarray, prompts: np.ndarray, dropped: Counter[str]) -> np.ndarray:
    """The first of the examples with each prompt, in their order."""
    _, first = np.unique(prompts[numbers], return_index=True)
    dropped["that repeat a prompt"] += len(numbers) - len(first)
    return numbers[np.sort(first)]


def _batches(examples: "datasets.Dataset", indices: np.ndarray, bar: tqdm) -> Iterator[list[Example]]:
    for start in range(0, len(indices), BATCH):
        columns = examples[indices[start : start + BATCH]]
        rows = (dict(zip(columns, values)) for values in zip(*columns.values(), strict=True))
        yield [example for row in rows if (example := read_example(row)) is not None]
        bar.update(len(columns["text"]))
        watchdog.working()


def _list(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none was dropped"
