"""From a `Corpus` to the two datasets of a step: read, divided, tokenised once and kept as Arrow files."""

from collections import Counter
from collections.abc import Iterator, Sequence
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
from utils.data.sources.corpus import Corpus
from utils.data.sources.reading import read_examples
from utils.data.sources.splits import divide
from utils.errors import InputError
from utils.parallel import distributed, watchdog

if TYPE_CHECKING:
    import datasets

BATCH = 512
HELD_OUT_SHARE = 0.05  # of the rows of a source that has none of its own


class TokenDataset(Dataset):
    """Rows of token ids, memory-mapped; see `build_datasets` for their keys.

    Attributes:
        description: one line on where the rows come from and what was dropped or cut.
        key: a hash of all that the rows depend on: the sources' content, tokenizer, lengths, seed, row format.
    """

    def __init__(self, rows: "datasets.Dataset", description: str, key: str) -> None:
        self._rows = rows
        self.description, self.key = description, key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(index)]

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
    "rejected_ids"}; "prompts" {"prompt_ids", "prompt" (the text), "reference" (the right answer, or None), "columns"
    (the row's other columns as JSON)}; "pretrain" {"input_ids", "response_start"} in blocks of `max_len` ids. Responses
    end with EOS unless they were cut.

    Held out are the files or the split that a source names so, else a twentieth of its rows (at least one), the same
    for all steps. The others are divided by `data_split`; rows of `undivided` paths all go to this step, rows for
    "pretrain" are not divided. Several sources are put together and shuffled.

    Args:
        is_writer: whether this process may prepare the data, for which the others wait; left out, the first process of
            each machine does.

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
            "form": corpus.form,
            "max_len": corpus.max_len,
            "seed": corpus.seed,
        }
    )
    if is_writer is None:
        is_writer = distributed.local_rank() == 0

    def build(folder: Path) -> None:
        _prepare(folder, corpus, encoder)

    folder = cached_folder(private_folder(corpus.cache_dir), key, build, is_writer=is_writer)
    description = f"{_names(corpus)}: " + (folder / "report.txt").read_text(encoding="utf-8")
    train, held_out = (
        TokenDataset(open_rows(folder / f"{name}.arrow"), description, key) for name in ("train", "eval")
    )
    return train, held_out


def _names(corpus: Corpus) -> str:
    return ", ".join(share.source.label for share in corpus.shares)


def _prepare(folder: Path, corpus: Corpus, encoder: Encoder) -> None:
    """Write train.arrow, eval.arrow and report.txt into `folder`."""
    dropped: Counter[str] = Counter()
    places: list[tuple[int, int]] = []  # of each source, how many examples are in its two parts
    write_rows(folder / "examples.arrow", EXAMPLES, _read_all(corpus, dropped, places))
    numbers = _choose(corpus, places, dropped)
    examples = open_rows(folder / "examples.arrow")
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
    report = f"{counts['train']} training rows and {counts['eval']} held-out rows"
    for remark, reasons in (("left out of all rows", dropped), (f"to fit {corpus.max_len} tokens", cut)):
        report += f"; {remark}: {_list(reasons)}" if any(reasons.values()) else ""
    (folder / "report.txt").write_text(report, encoding="utf-8")


def _read_all(corpus: Corpus, dropped: Counter[str], places: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """All examples of all sources; for one that the purpose leaves out, a row of nulls that keeps its place."""
    for share in corpus.shares:
        sizes = {"train": 0, "held_out": 0}
        for part in sizes if share.source.has_held_out else ("train",):
            for example in read_examples(share.source, part, corpus.purpose, dropped):
                sizes[part] += 1
                if sizes[part] % BATCH == 0:
                    watchdog.working()
                yield example_row(example, corpus.purpose)
        places.append((sizes["train"], sizes["held_out"]))


def _choose(corpus: Corpus, places: Sequence[tuple[int, int]], dropped: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on and to hold out, over all sources, shuffled."""
    train, held_out, start = [], [], 0
    for share, (rows, rows_held_out) in zip(corpus.shares, places, strict=True):
        held_out_share = 0.0 if rows_held_out else HELD_OUT_SHARE
        try:
            chosen, kept = divide(rows, share.weights, share.part, corpus.seed, held_out_share)
        except ValueError as error:
            remarks = f" ({_list(dropped)})" if any(dropped.values()) else ""
            raise InputError(
                f"{share.source.label}: {rows} usable rows{remarks} are too few: one is held out and every "
                "part of --data_split needs one; give more data, or 0 for the parts that are not needed"
            ) from error
        train.append(start + chosen)
        held_out.append(start + rows + np.arange(rows_held_out) if rows_held_out else start + kept)
        start += rows + rows_held_out
    shuffle = np.random.RandomState(corpus.seed)
    return shuffle.permutation(np.concatenate(train)), shuffle.permutation(np.concatenate(held_out))


def _batches(examples: "datasets.Dataset", indices: np.ndarray, bar: tqdm) -> Iterator[list[Example]]:
    for start in range(0, len(indices), BATCH):
        columns = examples[indices[start : start + BATCH]]
        rows = (dict(zip(columns, values)) for values in zip(*columns.values(), strict=True))
        yield [example for row in rows if (example := read_example(row)) is not None]
        bar.update(len(columns["text"]))
        watchdog.working()


def _list(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none was dropped"
