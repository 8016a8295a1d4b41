"""What is measured of a step's rows: their lengths before anything is cut, length bias, duplicates."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import StepConfig
from utils.data import Corpus, TokenDataset, build_datasets
from utils.data.rows.duplicates import Parts, find_duplicates
from utils.data.rows.encoding import Span

UNCUT = 2**30  # tokens; no row is longer
ANSWERS = ("response", "chosen", "rejected")
_COLUMNS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids", "response": "response_ids"}


@dataclass(frozen=True)
class Duplicates:
    """Numbers of rows that repeat another one: training rows an earlier training row, or a held-out row.

    The near ones include the exact ones; None where the library for them is missing.
    """

    exact_in_training: int
    exact_of_held_out: int
    near_in_training: int | None
    near_of_held_out: int | None


@dataclass(frozen=True)
class Inspection:
    """The rows of a step and what was measured of them.

    Attributes:
        train, held_out: rows as they are trained on.
        lengths: tokens of the parts of each training row before anything is cut, each (rows,) int64: "prompt", and
            "response", or "chosen" and "rejected".
        labels: of rows with a label (KTO), (rows,) bool; else None.
        max_len: tokens of the longest row that is not cut, set by `length_flag`.
    """

    purpose: str
    max_len: int
    length_flag: str
    train: TokenDataset
    held_out: TokenDataset
    lengths: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    duplicates: Duplicates

    @property
    def totals(self) -> np.ndarray:
        """(rows,) tokens of each row: prompt and longest response."""
        answers = [self.lengths[name] for name in ANSWERS if name in self.lengths]
        return self.lengths["prompt"] + (np.maximum.reduce(answers) if answers else 0)

    def share_cut(self, max_len: int) -> float:
        """The share of the rows that would be cut, or divided if they are plain text, at this limit."""
        return float((self.totals > max_len).mean())

    def length_bias(self) -> dict[str, float] | None:
        """How far a judge could tell good answers by their length alone; None without good and bad answers.

        Of pairs: the share whose chosen response is the longer one (ties count half), and the mean difference in
        tokens. Of rows with a label: the same over all pairs of a desirable and an undesirable row, which is the area
        under the ROC curve of length as a classifier.
        """
        if "chosen" in self.lengths:
            good, bad = self.lengths["chosen"], self.lengths["rejected"]
            longer = float(((good > bad) + 0.5 * (good == bad)).mean())
        elif self.labels is not None and 0 < self.labels.sum() < len(self.labels):
            good, bad = self.lengths["response"][self.labels], np.sort(self.lengths["response"][~self.labels])
            below, up_to = (np.searchsorted(bad, good, side=side) for side in ("left", "right"))
            longer = float((below + 0.5 * (up_to - below)).mean() / len(bad))
        else:
            return None
        return {"longer": longer, "mean_difference": float(good.mean() - bad.mean())}

    def report(self) -> dict[str, Any]:
        """What `inspect.json` says."""
        limits = sorted({self.max_len, *(2**power for power in range(7, 15))})
        return {
            "data": self.train.report,
            "tokens_before_cutting": {name: _summary(values) for name, values in self.lengths.items()}
            | {"total": _summary(self.totals)},
            "max_len": self.max_len,
            "share_cut": self.share_cut(self.max_len),
            "share_cut_at": {str(limit): self.share_cut(limit) for limit in limits},
            "length_bias": self.length_bias(),
            "duplicates": vars(self.duplicates),
        }


def inspect(config: StepConfig, tokenizer: PreTrainedTokenizerBase) -> Inspection:
    """Prepare the rows of a step with its flags, once as they are trained on and once uncut, and measure them.

    Duplicates are counted as `--deduplicate` compares rows: in the project's own text form, where a chat template would
    make all rows more alike. With a template these are prepared too, and then without the filters for lengths.

    Raises:
        InputError: data that cannot be read or used.
    """
    corpus = Corpus.of(config)
    corpus.check()
    train, held_out = build_datasets(corpus, tokenizer)
    uncut = replace(corpus, max_len=UNCUT, filters=replace(corpus.filters, drop_truncated=False))
    whole, whole_held_out = build_datasets(uncut, tokenizer)
    whole = whole.of_all_epochs()
    return Inspection(
        purpose=corpus.purpose,
        max_len=corpus.max_len,
        length_flag=corpus.length_flag,
        train=train,
        held_out=held_out,
        lengths=_lengths(whole),
        labels=np.array(whole.column("label"), dtype=bool) if corpus.purpose == "labelled" else None,
        duplicates=_duplicates(*_compared(uncut, tokenizer, (whole, whole_held_out)), tokenizer),
    )


def _compared(
    uncut: Corpus, tokenizer: PreTrainedTokenizerBase, rows: tuple[TokenDataset, TokenDataset]
) -> tuple[TokenDataset, TokenDataset]:
    """The uncut `rows`, training and held-out, in the project's own text form."""
    if not (tokenizer.chat_template or uncut.system_prompt):
        return rows
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    filters = replace(uncut.filters, min_response_tokens=0, max_row_tokens=None)
    train, held_out = build_datasets(replace(uncut, system_prompt=None, train_on="last", filters=filters), plain)
    return train.of_all_epochs(), held_out


def sequences(row: Mapping[str, Any]) -> dict[str, tuple[list[int], list[Span]]]:
    """(ids, trained spans) of the sequences of a prepared row, by name; each span is (start, end).

    The last span is that of the response; a prompt alone has none.
    """
    if "input_ids" in row:
        ids = row["input_ids"]
        edges = row.get("target_spans") or (row["response_start"], len(ids))
        return {"response": (ids, list(zip(edges[::2], edges[1::2], strict=True)))}
    prompt, names = row["prompt_ids"], [name for name in ANSWERS if _COLUMNS[name] in row]
    whole = {name: prompt + row[_COLUMNS[name]] for name in names}
    return {name: (ids, [(len(prompt), len(ids))]) for name, ids in whole.items()} or {"prompt": (prompt, [])}


def _lengths(rows: TokenDataset) -> dict[str, np.ndarray]:
    first = rows[0]
    if "input_ids" in first:
        starts = np.array(rows.column("response_start"))
        return {"prompt": starts, "response": np.array(rows.lengths()) - starts}
    return {name: np.array(rows.lengths(column)) for name, column in _COLUMNS.items() if column in first}


def _duplicates(train: TokenDataset, held_out: TokenDataset, tokenizer: PreTrainedTokenizerBase) -> Duplicates:
    """Held-out rows come first, so that they stay and the training rows repeat them."""
    counts: list[int | None] = []

    def read(numbers: Sequence[int]) -> list[Parts]:
        some = (held_out[n] if n < len(held_out) else train[n - len(held_out)] for n in numbers)
        return [_texts(row, tokenizer) for row in some]

    for near in (False, True):
        if near and not _has_minhash():
            counts += [None, None]
            continue
        repeats = find_duplicates(read, len(held_out) + len(train), near=near, protected=len(held_out))
        counts += [int((repeats >= len(held_out)).sum()), int(((repeats >= 0) & (repeats < len(held_out))).sum())]
    return Duplicates(counts[0], counts[1], counts[2], counts[3])


def _has_minhash() -> bool:
    try:
        import rensa  # noqa: F401
    except ImportError:
        return False
    return True


def _texts(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Parts:
    found = [(ids, spans[-1][0] if spans else len(ids)) for ids, spans in sequences(row).values()]
    ids, start = found[0]
    ids = [ids[:start], *(ids[start:] for ids, start in found if start < len(ids))]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return (*texts, *([str(row["label"])] if "label" in row else []))


def _summary(lengths: np.ndarray) -> dict[str, float]:
    levels = (5, 25, 50, 75, 95, 99)
    found = {f"p{level}": float(value) for level, value in zip(levels, np.percentile(lengths, levels), strict=True)}
    return {"mean": float(lengths.mean()), **found, "longest": int(lengths.max())}
