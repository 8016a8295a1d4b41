"""Flags for the data that a step reads."""

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import LARGEST_SEED, Arguments, flag
from utils.arguments.choices import CHAT_TEMPLATES, TEXT_FORM
from utils.errors import InputError

SPLIT_PARTS = 3
STREAM_HELD_OUT = 512  # held-out rows of a stream, which must be a limited number
SUM_TOLERANCE = 1e-6  # by which the weights of the sources may miss 1


def split_weights(data_split: str) -> tuple[float, ...]:
    """The weights of the three steps in "2,4,4".

    Raises:
        InputError: these are not three numbers of at least 0, one of them above 0.
    """
    try:
        weights = tuple(float(part) for part in data_split.split(","))
    except ValueError:
        raise InputError(f"--data_split {data_split!r}: expected three numbers like 2,4,4") from None
    if len(weights) != SPLIT_PARTS or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise InputError(f"--data_split {data_split!r}: expected three numbers like 2,4,4, not all zero")
    return weights


def weighted_path(value: str) -> tuple[str, float | None]:
    """A source and its weight: "name:0.3" is ("name", 0.3).

    The weight is None, and the source is the whole value, where no number follows the last colon or where the value as
    it is given is the path of something that exists.
    """
    source, _, number = value.rpartition(":")
    if not source or os.path.exists(os.path.expanduser(value)):
        return value, None
    try:
        return source, float(number)
    except ValueError:
        return value, None


def blend_weights(data_path: Sequence[str]) -> tuple[list[str], tuple[float, ...] | None]:
    """The sources that `data_path` names, and their weights; None where no source has one.

    Raises:
        InputError: only some have a weight, a weight is not above 0, or the weights do not sum to 1.
    """
    pairs = [weighted_path(value) for value in data_path]
    sources = [source for source, _ in pairs]
    weights = tuple(weight for _, weight in pairs if weight is not None)
    if not weights:
        return sources, None
    if len(weights) < len(pairs):
        bare = next(source for source, weight in pairs if weight is None)
        with_weight = next(value for value in data_path if value != weighted_path(value)[0])
        raise InputError(
            f"--data_path: {with_weight} has a weight and {bare} has none; give every source a weight, or none of them"
        )
    for value, weight in zip(data_path, weights, strict=True):
        if not 0 < weight < math.inf:
            raise InputError(f"--data_path {value}: a weight must be above 0; change it, or leave the source out")
    total = sum(weights)
    if abs(total - 1) > SUM_TOLERANCE * (1 + 1e-6):
        scaled = [round(weight / total, 6) for weight in weights[:-1]]
        named = " ".join(f"{share:g}" for share in (*scaled, round(1 - sum(scaled), 6)))
        raise InputError(
            f"--data_path: the weights {' + '.join(f'{weight:g}' for weight in weights)} sum to {total:g} and must sum "
            f"to 1; for the same proportions give {named}"
        )
    return sources, weights


@dataclass(kw_only=True)
class CorpusArguments(Arguments):
    """Data that every step reads."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "local files or folders (jsonl, json, csv, parquet), or names of data sets on the hub; several are blended: "
        "each row once per epoch or, where each has a weight (a:0.7 b:0.3; they sum to 1), with these shares of the "
        "rows of an epoch, which ends when the source that is scarcest for its weight has been read once; the others "
        "go on with their other rows in the next epoch",
    )
    data_split: str = flag(
        "2,4,4",
        "relative sizes of the disjoint parts of the data for steps 1, 2 and 3: no step trains on another's rows",
    )
    data_seed: int = flag(
        1234,
        "seed for choosing the held-out rows and the rows of each of the three steps: use the same for all steps, "
        "whatever their --seed, or a later step sees rows of an earlier one",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    prompt_form: Literal["auto", "raw", "dialogue"] = flag(
        "auto",
        "how to treat a prompt that is text: as a question, which becomes ' Human: ... Assistant:' (dialogue), or as a "
        "finished prompt that already ends with an answer marker and is used unchanged (raw); auto decides for each "
        "data set by the endings of its first prompts. Use the same for all steps",
    )
    chat_template: str | None = flag(
        None,
        f"how dialogues are written: {', '.join(CHAT_TEMPLATES)}, a file NAME.jinja, or {TEXT_FORM} "
        "(' Human: ... Assistant: ...'); if omitted, the tokenizer's own chat template, or human_assistant where it "
        "has none. The saved tokenizer carries it, so later steps need not repeat it",
    )
    system_prompt: str | None = flag(
        None, "system message of dialogues that have none of their own. Use the same for all steps"
    )
    deduplicate: Literal["none", "exact", "near"] = flag(
        "none",
        "leave out training rows that repeat another training row or a held-out row: exact compares their texts, near "
        "also finds small edits, in any language (MinHash; needs pip install rensa)",
    )
    max_row_tokens: int | None = flag(
        None,
        "leave out rows of more tokens than this, prompt and longest response together, before anything is cut",
        at_least=1,
    )
    drop_truncated: bool = flag(False, "leave out rows that would be cut to fit the longest row, instead of cutting")
    drop_empty: bool = flag(
        False,
        "leave out rows with a response in which nothing is visible, which are an error in a file of your own "
        "otherwise, and pairs whose responses differ in nothing visible",
    )
    streaming: bool = flag(
        False,
        "read the training rows while training, in constant memory and without a cache: for data larger than memory or "
        "disk. Needs --max_steps. The division among the steps and the held-out rows is drawn for each prompt by "
        "itself, so it is another one than without this flag: use it in all steps or in none",
    )
    shuffle_buffer_size: int = flag(
        10_000,
        "rows of a stream that are read at a time and put in random order: more of them mix better, and take memory",
        at_least=1,
        idle_unless="streaming",
    )
    data_output_path: str | None = flag(
        None,
        "cache folder for tokenised data; if omitted, a folder private to the user (not a shared /tmp/data_files, "
        "which other users of the machine could read or replace)",
        resume="free",
    )

    def check(self) -> None:
        split_weights(self.data_split)
        if not self.data_path or not all(self.data_path):
            raise InputError("--data_path is empty: name at least one file, folder or data set")
        blend_weights(self.data_path)
        _check_template_name(self.chat_template)
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise InputError("--system_prompt is empty: leave it out, or give a text")

    @property
    def held_out_limit(self) -> int:
        """Held-out rows to evaluate on, at most; 0: all."""
        return 0

    @property
    def data_sources(self) -> list[str]:
        """What `--data_path` names, without the weights."""
        return blend_weights(self.data_path)[0]

    @property
    def data_weights(self) -> tuple[float, ...] | None:
        """The weight of each source; None: each row once per epoch."""
        return blend_weights(self.data_path)[1]


def _check_template_name(name: str | None) -> None:
    """Raises InputError for what is neither a named template nor, by its form, a file."""
    names = [*CHAT_TEMPLATES, TEXT_FORM]
    if name is None or name in names or name.endswith((".jinja", ".jinja2", ".j2")):
        return
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(
        f"--chat_template {name!r}: unknown template{hint}; choose from {', '.join(names)}, or give a file NAME.jinja"
    )


@dataclass(kw_only=True)
class DataArguments(CorpusArguments):
    """Data."""

    max_seq_len: int = flag(
        512, "tokens of prompt and response together; longer prompts lose their beginning", at_least=2
    )
    min_response_tokens: int = flag(
        0,
        "leave out rows with a response of fewer tokens, its end token not counted; of a dialogue the last answer is "
        "measured",
        at_least=0,
    )
    eval_samples: int = flag(
        0, f"held-out rows to evaluate on; 0 = all, or {STREAM_HELD_OUT} with --streaming", at_least=0
    )

    @property
    def held_out_limit(self) -> int:
        return self.eval_samples


@dataclass(kw_only=True)
class PromptArguments(CorpusArguments):
    """Data."""

    unsupervised_dataset_name: str | None = flag(
        None,
        "text for a language-modelling loss added to PPO's (InstructGPT's ptx), which preserves the model's other "
        "abilities",
    )
    unsupervised_dataset_config_name: str | None = flag(
        None,
        "configuration of that data set, such as wikitext-2-raw-v1",
        idle_unless="unsupervised_dataset_name",
    )
    unsup_coef: float = flag(27.8, "weight of the ptx loss", at_least=0, idle_unless="unsupervised_dataset_name")
    preprocessing_num_workers: int | None = flag(
        None,
        "accepted for old scripts: one process per machine tokenises, once, into the cache",
        at_least=1,
        resume="free",
        idle="one process per machine tokenises, once, and the cache keeps the result",
    )
