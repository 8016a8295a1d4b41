"""Flags for the data that a step reads."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import LARGEST_SEED, Arguments, flag
from utils.errors import InputError

SPLIT_PARTS = 3


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


@dataclass(kw_only=True)
class CorpusArguments(Arguments):
    """Data that every step reads."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "local files or folders (jsonl, json, csv, parquet), or names of data sets on the hub; several are blended",
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


@dataclass(kw_only=True)
class DataArguments(CorpusArguments):
    """Data."""

    max_seq_len: int = flag(
        512, "tokens of prompt and response together; longer prompts lose their beginning", at_least=2
    )
    eval_samples: int = flag(0, "held-out rows to evaluate on; 0 = all", at_least=0)


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
