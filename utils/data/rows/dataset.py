"""From a `Corpus` to the two datasets of a step: read, divided, tokenised once and cached as Arrow files."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.data.formats.dialogue import FORMS
from utils.data.formats.example import Example
from utils.data.rows.arrow_rows import EXAMPLES, SCHEMAS, example_row, open_rows, read_example, write_rows
from utils.data.rows.cache import cached_folder, key_of, private_folder
from utils.data.rows.token_rows import token_rows
from utils.data.rows.tokenization import Encoder, tokenizer_fingerprint
from utils.data.sources.corpus import Corpus, Share
from utils.data.sources.reading import read_examples
from utils.data.sources.splits import divide
from utils.errors import InputError, counted
from utils.parallel import distributed, watchdog

if TYPE_CHECKING:
    import datasets

BATCH = 512
HELD_OUT_SHARE = 0.05  # of the rows of a source that comes without held-out rows


class TokenDataset(Dataset):
    """Rows of token ids, memory-mapped; see `build_datasets` for their keys.

    Attributes:
        description: lines on where the rows come from, how they were divided and what was left out or cut.
        key: a hash of all that the rows depend on: the sources' content, tokenizer, lengths, seed, row format.
    """

    def __init__(self, rows: "datasets.Dataset", description: str, key: str) -> None:
        self._rows = rows
        self.description, self.key = description, key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(index)]

    def column(self, name: str) -> list[Any]:
        """The values of each row in a column."""
        return self._rows.data.column(name).to_pylist()

    def lengths(self, column: str = "input_ids") -> list[int]:
        """Tokens of each row's `column`, read without the ids."""
        return pc.list_value_length(self._rows.data.column(column)).to_pylist()

    def head(self, count: int) -> "TokenDataset":
        """The first `count` rows (all of them for 0), which are a fair sample: rows are in random order already."""
        rows = self._rows.select(range(min(count, len(self)))) if count else self._rows
        return TokenDataset(rows, self.description, self.key)


def build_datasets(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, is_writer: bool | None = None
) -> tuple[TokenDataset, TokenDataset]:
    """The training and the held-out rows of a step.

    Rows are dicts: purpose "sft" {"input_ids", "response_start"}; "preference" {"prompt_ids", "chosen_ids",
    "rejected_ids"}; "labelled" {"prompt_ids", "response_ids", "label"}; "prompts" {"prompt_ids", "prompt" (the text),
    "reference" (the right answer, or None), "columns" (the row's other columns as JSON)}; "pretrain" {"input_ids",
    "response_start"} in blocks of `max_len` ids. Responses end with EOS unless they were cut.

    Held out are the files or the split that a source declares as such, else a twentieth of its rows (at least one), the
    same for all steps. The others are divided by `data_split`; rows of `undivided` paths all go to this step, rows for
    "pretrain" are not divided. Several sources are concatenated and shuffled.

    Args:
        is_writer: whether this process may prepare the data, for which the others wait; if omitted, the first process
            of each machine does.

    Raises:
        InputError: data that cannot be read or used; the message names the file and the line or row, or the flag.
    """
    encoder = Encoder(tokenizer)
    least = len(encoder.prefix) + 2
    if corpus.max_len < least:
        raise InputError(f"{corpus.length_flag} {corpus.max_len} is too short for a row; give at least {least}")
    key = key_of(
        {
            "purpose": corpus.purpose,
            "shares": [[share.source.fingerprint(), share.weights, share.part] for share in corpus.shares],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "forms": [corpus.form, corpus.prompt_form],
            "max_len": corpus.max_len,
            "seed": corpus.seed,
        }
    )
    if is_writer is None:
        is_writer = distributed.local_rank() == 0

    def build(folder: Path) -> None:
        _prepare(folder, corpus, encoder)

    folder = cached_folder(private_folder(corpus.cache_dir), key, build, is_writer=is_writer)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = (_Division(**division).line(share, corpus) for share, division in zip(corpus.shares, report["sources"]))
    description = "\n".join([*sources, report["rows"]])
    train, held_out = (
        TokenDataset(open_rows(folder / f"{name}.arrow"), description, key) for name in ("train", "eval")
    )
    return train, held_out


def _names(corpus: Corpus) -> str:
    return ", ".join(share.source.label for share in corpus.shares)


@dataclass
class _Division:
    """How the rows of a source were divided: `parts` counts the `train` rows held out, then those of each step."""

    train: int
    held_out: int
    parts: list[int] = field(default_factory=list)

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
        return text + share.source.remark


def _prepare(folder: Path, corpus: Corpus, encoder: Encoder) -> None:
    """Write train.arrow, eval.arrow and report.json into `folder`."""
    dropped: Counter[str] = Counter()
    divisions: list[_Division] = []
    write_rows(folder / "examples.arrow", EXAMPLES, _read_all(corpus, dropped, divisions))
    examples = open_rows(folder / "examples.arrow")
    numbers = _choose(corpus, divisions, np.asarray(examples.data.column("prompt_number")), dropped)
    counts: dict[str, int] = {}
    cut: Counter[str] = Counter()
    for name, indices in zip(("train", "eval"), numbers, strict=True):
        with tqdm(total=len(indices), desc=f"preparing {name} rows", unit=" rows", delay=3, leave=False) as bar:
            batches = _batches(examples, indices, bar)
            rows = token_rows(corpus.purpose, encoder, FORMS[corpus.form], batches, corpus.max_len, cut)
            counts[name] = write_rows(folder / f"{name}.arrow", SCHEMAS[corpus.purpose], rows)
        if not counts[name]:
            what = "training" if name == "train" else "held-out"
            raise InputError(
                f"{_names(corpus)}: no {what} row is left of {len(indices)} ({_list(dropped + cut)}); "
                "give more data, or data that this step can use"
            )
    (folder / "examples.arrow").unlink()
    rows = f"{counted(counts['train'], 'training row')} and {counted(counts['eval'], 'held-out row')}"
    for remark, reasons in (("left out of all rows", dropped), (f"to fit {corpus.max_len} tokens", cut)):
        rows += f"; {remark}: {_list(reasons)}" if any(reasons.values()) else ""
    report = {"sources": [vars(division) for division in divisions], "rows": rows}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _read_all(corpus: Corpus, dropped: Counter[str], divisions: list[_Division]) -> Iterator[dict[str, Any]]:
    """All examples of all sources; for one that the purpose leaves out, an empty row that keeps its place."""
    for share in corpus.shares:
        sizes = {"train": 0, "held_out": 0}
        for part in sizes if share.source.has_held_out else ("train",):
            for number, example in read_examples(share.source, part, corpus.purpose, dropped, corpus.prompt_form):
                sizes[part] += 1
                if sizes[part] % BATCH == 0:
                    watchdog.working()
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
