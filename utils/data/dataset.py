"""From `--data_path` to the two datasets of a step: read, divided, tokenised once and kept as Arrow files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils import watchdog
from utils.data.arrow_rows import EXAMPLES, SCHEMAS, open_rows, write_rows
from utils.data.cache import cached_folder, key_of, private_folder
from utils.data.example import Example, Purpose
from utils.data.sources import HubSource, LocalSource, open_source, read_examples, source_flag
from utils.data.splits import divide, phase_weights
from utils.data.token_rows import token_rows
from utils.data.tokenization import Encoder, tokenizer_fingerprint
from utils.errors import InputError

if TYPE_CHECKING:
    import datasets

BATCH = 512


class TokenDataset(Dataset):
    """Rows of token ids, memory-mapped; see `build_datasets` for their keys.

    Attributes:
        description: one line on where the rows come from and what was dropped or cut.
        key: a hash of all that the rows depend on: the sources' content, tokenizer, lengths, seed, code.
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
    purpose: Purpose,
    *,
    data_path: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data_split: str = "2,4,4",
    max_seq_len: int = 512,
    max_prompt_len: int = 256,
    seed: int = 1234,
    cache_dir: str | None = None,
    eval_fraction: float = 0.05,
    sft_only_data_path: Sequence[str] = (),
    config_name: str | None = None,
    is_writer: bool = True,
    timeout_s: float = 7200.0,
) -> tuple[TokenDataset, TokenDataset]:
    """The training and the held-out rows of a step.

    Rows are dicts: purpose "sft" {"input_ids", "response_start"}; "preference" {"prompt_ids", "chosen_ids",
    "rejected_ids"}; "prompts" {"prompt_ids", "prompt" (the text)}; "pretrain" {"input_ids", "response_start"} in blocks
    of `max_seq_len` ids. Responses end with EOS unless they were cut.

    Held out are the files or the split that a source names so, else `eval_fraction` of its rows (at least one), the
    same for all steps. The others are divided by `data_split`; rows of `sft_only_data_path` all go to "sft", rows for
    "pretrain" are not divided. Several sources are put together and shuffled.

    Args:
        max_seq_len: ids of prompt and response together; `max_prompt_len` ids of a prompt, for "prompts" alone.
        cache_dir: folder for prepared data (--data_output_path); None: the user's cache folder.
        config_name: configuration of a hub data set.
        is_writer: whether this process may prepare the data (one per machine does); others wait for it `timeout_s`.

    Raises:
        InputError: data that cannot be read or used; the message names the file and the line or row, or the flag.
    """
    weights, part = phase_weights(data_split, purpose)
    shares = [_Share(open_source(name, config_name, source_flag(purpose)), weights, part) for name in data_path]
    if purpose == "sft":
        shares += [_Share(open_source(name, flag="--sft_only_data_path"), (1.0,), 0) for name in sft_only_data_path]
    encoder = Encoder(tokenizer)
    max_len = _checked_length(purpose, encoder, max_prompt_len if purpose == "prompts" else max_seq_len)
    key = key_of(
        {
            "purpose": purpose,
            "shares": [[share.source.fingerprint(), share.weights, share.part] for share in shares],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "max_len": max_len,
            "seed": seed,
            "eval_fraction": eval_fraction,
        }
    )

    def build(folder: Path) -> None:
        _prepare(folder, purpose, shares, encoder, max_len, seed, eval_fraction)

    folder = cached_folder(private_folder(cache_dir), key, build, is_writer=is_writer, timeout_s=timeout_s)
    description = f"{_names(shares)}: " + (folder / "report.txt").read_text(encoding="utf-8")
    train, held_out = (
        TokenDataset(open_rows(folder / f"{name}.arrow"), description, key) for name in ("train", "eval")
    )
    return train, held_out


@dataclass(frozen=True)
class _Share:
    """A source, and which of the parts that `weights` makes of it is wanted."""

    source: LocalSource | HubSource
    weights: tuple[float, ...]
    part: int


def _names(shares: Sequence[_Share]) -> str:
    return ", ".join(share.source.label for share in shares)


def _checked_length(purpose: Purpose, encoder: Encoder, max_len: int) -> int:
    least = len(encoder.prefix) + 2
    if max_len < least:
        flag = "--max_prompt_seq_len" if purpose == "prompts" else "--max_seq_len"
        raise InputError(f"{flag} {max_len} is too short for a row; give at least {least}")
    return max_len


def _prepare(
    folder: Path,
    purpose: Purpose,
    shares: Sequence[_Share],
    encoder: Encoder,
    max_len: int,
    seed: int,
    eval_fraction: float,
) -> None:
    """Write train.arrow, eval.arrow and report.txt into `folder`."""
    dropped: Counter[str] = Counter()
    places: list[tuple[int, int]] = []  # of each source, how many examples are in its two parts
    write_rows(folder / "examples.arrow", EXAMPLES, _read_all(shares, purpose, dropped, places))
    numbers = _choose(shares, places, seed, eval_fraction, dropped)
    examples = open_rows(folder / "examples.arrow")
    counts: dict[str, int] = {}
    cut: Counter[str] = Counter()
    for name, indices in zip(("train", "eval"), numbers, strict=True):
        with tqdm(total=len(indices), desc=f"preparing {name} rows", unit=" rows", delay=3, leave=False) as bar:
            rows = token_rows(purpose, encoder, _batches(examples, indices, bar), max_len, cut)
            counts[name] = write_rows(folder / f"{name}.arrow", SCHEMAS[purpose], rows)
        if not counts[name]:
            what = "training" if name == "train" else "held-out"
            raise InputError(
                f"{_names(shares)}: no {what} row is left of {len(indices)} ({_list(dropped + cut)}); "
                "give more data, or data that this step can use"
            )
    (folder / "examples.arrow").unlink()
    report = f"{counts['train']} training rows and {counts['eval']} held-out rows"
    for remark, reasons in (("left out of all rows", dropped), (f"to fit {max_len} tokens", cut)):
        report += f"; {remark}: {_list(reasons)}" if any(reasons.values()) else ""
    (folder / "report.txt").write_text(report, encoding="utf-8")


def _read_all(
    shares: Sequence[_Share], purpose: Purpose, dropped: Counter[str], places: list[tuple[int, int]]
) -> Iterator[dict[str, str | None]]:
    """All examples of all sources; for one that the purpose leaves out, a row of nulls that keeps its place."""
    for share in shares:
        sizes = {"train": 0, "held_out": 0}
        for part in sizes if share.source.has_held_out else ("train",):
            for example in read_examples(share.source, part, purpose, dropped):
                sizes[part] += 1
                if sizes[part] % BATCH == 0:
                    watchdog.working()
                yield vars(example) if example else dict.fromkeys(EXAMPLES.names)
        places.append((sizes["train"], sizes["held_out"]))


def _choose(
    shares: Sequence[_Share], places: Sequence[tuple[int, int]], seed: int, eval_fraction: float, dropped: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on and to hold out, over all sources, shuffled."""
    train, held_out, start = [], [], 0
    for share, (rows, rows_held_out) in zip(shares, places, strict=True):
        try:
            chosen, kept = divide(rows, share.weights, share.part, seed, 0.0 if rows_held_out else eval_fraction)
        except ValueError as error:
            remarks = f" ({_list(dropped)})" if any(dropped.values()) else ""
            raise InputError(
                f"{share.source.label}: {rows} usable rows{remarks} are too few: one is held out and every "
                "part of --data_split needs one; give more data, or 0 for the parts that are not needed"
            ) from error
        train.append(start + chosen)
        held_out.append(start + rows + np.arange(rows_held_out) if rows_held_out else start + kept)
        start += rows + rows_held_out
    shuffle = np.random.RandomState(seed)
    return shuffle.permutation(np.concatenate(train)), shuffle.permutation(np.concatenate(held_out))


def _batches(examples: "datasets.Dataset", indices: np.ndarray, bar: tqdm) -> Iterator[list[Example]]:
    for start in range(0, len(indices), BATCH):
        columns = examples[indices[start : start + BATCH]]
        rows = zip(*(columns[name] for name in EXAMPLES.names), strict=True)
        yield [Example(*row) for row in rows if row[0] is not None]
        bar.update(len(columns["prompt"]))
        watchdog.working()


def _list(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none was dropped"
