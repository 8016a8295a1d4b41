"""The data of a step: which sources, divided how, and cut to what length."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.arguments.data import STREAM_HELD_OUT
from utils.arguments.steps import PpoConfig, StepConfig
from utils.data.formats.example import Purpose
from utils.data.rows.duplicates import minhash_library
from utils.data.rows.filters import Filters
from utils.data.sources.hub import is_reachable
from utils.data.sources.local_files import stream_rows
from utils.data.sources.reading import HubSource, LocalSource, open_source, read_examples
from utils.data.sources.scoring import Scoring
from utils.data.sources.splits import phase_weights

CHECKED_ROWS = 20


@dataclass(frozen=True)
class Share:
    """A source, divided by `weights`, and the index of the part to use.

    blend_weight: its share of an epoch; None: all of its rows, in every epoch.
    """

    source: LocalSource | HubSource
    weights: tuple[float, ...]
    part: int
    blend_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What `build_datasets` prepares.

    Attributes:
        paths: what `flag` names. undivided: additional paths, all of whose rows are used (`--sft_only_data_path`).
        blend_weights: the shares of an epoch that the `paths` have, see `utils.data.rows.blending`; None: all rows.
        max_len: token ids of prompt and response together; for prompts alone, of the prompt.
        data_split: weights of the three steps; text for "pretrain" is not divided.
        config_name: configuration of a hub data set.
        cache_dir: folder for prepared data (`--data_output_path`); None: the user's cache folder.
        prompt_form, number_columns, scoring: see `read_examples`.
        pairs: made of several answers to a prompt, "best_worst" or "all", for purpose "preference".
        system_prompt: of dialogues that have none. train_on: the answers of a dialogue that are trained, "last" or
            "all", for purpose "sft".
        filters: which rows are left out.
        shuffle_buffer: above 0, training rows are streamed, and so many at a time are put in random order.
        held_out_rows: of a stream, at most.
    """

    purpose: Purpose
    paths: Sequence[str]
    max_len: int
    data_split: str = "2,4,4"
    undivided: Sequence[str] = ()
    blend_weights: Sequence[float] | None = None
    config_name: str | None = None
    seed: int = 1234
    cache_dir: str | None = None
    prompt_form: str = "auto"
    number_columns: Mapping[str, str] = field(default_factory=dict)
    scoring: Scoring | None = None
    pairs: str = "best_worst"
    system_prompt: str | None = None
    train_on: str = "last"
    filters: Filters = Filters()
    shuffle_buffer: int = 0
    held_out_rows: int = 0

    @staticmethod
    def of(config: StepConfig) -> "Corpus":
        """The rows that a step trains on."""
        return Corpus(
            purpose=config.purpose,
            paths=config.data_sources,
            blend_weights=config.data_weights,
            undivided=config.undivided_paths,
            max_len=config.row_limit,
            data_split=config.data_split,
            prompt_form=config.prompt_form,
            number_columns=config.number_columns,
            scoring=Scoring(config.score_columns, config.score_threshold) if config.score_columns else None,
            pairs=config.pairs,
            system_prompt=config.system_prompt,
            train_on=config.train_on,
            seed=config.data_seed,
            cache_dir=config.data_output_path,
            filters=Filters.of(config),
            shuffle_buffer=config.shuffle_buffer_size if config.streaming else 0,
            held_out_rows=config.held_out_limit or STREAM_HELD_OUT if config.streaming else 0,
        )

    @staticmethod
    def of_texts(config: PpoConfig) -> "Corpus | None":
        """The text of the language-modelling loss added to PPO's; None without `--unsupervised_dataset_name`.

        It is divided into blocks, and of the filters only the one for duplicates applies.
        """
        if not config.unsupervised_dataset_name:
            return None
        return Corpus(
            purpose="pretrain",
            paths=[config.unsupervised_dataset_name],
            config_name=config.unsupervised_dataset_config_name,
            max_len=config.longest_row()[0],
            prompt_form=config.prompt_form,
            system_prompt=config.system_prompt,
            seed=config.data_seed,
            cache_dir=config.data_output_path,
            filters=Filters(deduplicate=config.deduplicate),
        )

    @property
    def flag(self) -> str:
        """The flag that names the data."""
        return "--unsupervised_dataset_name" if self.purpose == "pretrain" else "--data_path"

    @property
    def streams(self) -> bool:
        """Whether training rows are read while training."""
        return self.shuffle_buffer > 0

    @property
    def length_flag(self) -> str:
        """The flag that sets `max_len`."""
        return "--max_prompt_seq_len" if self.purpose == "prompts" else "--max_seq_len"

    @property
    def names(self) -> list[str]:
        """A short name of each source, in order: the last part of its path, or all of it where two would be equal."""
        paths = [*self.paths, *self.undivided]
        short = [Path(path).name for path in paths]
        return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]

    @property
    def reading(self) -> dict[str, Any]:
        """How rows become examples: the options of `read_examples`, and of `read_group`."""
        return {
            "prompt_form": self.prompt_form,
            "number_columns": self.number_columns,
            "scoring": self.scoring,
            "skip_empty": self.filters.drop_empty,
        }

    @property
    def makes_pairs(self) -> bool:
        """Whether examples become pairs only when they are seen together, by prompt."""
        return self.purpose == "preference" and (self.scoring is not None or self.pairs == "all")

    @property
    def pairing(self) -> dict[str, object]:
        """What determines which pairs there are, other than by default; JSON values."""
        scores = {"scores": [dict(self.scoring.columns), self.scoring.threshold]} if self.scoring else {}
        return scores | ({"pairs": self.pairs} if self.purpose == "preference" and self.pairs != "best_worst" else {})

    @cached_property
    def shares(self) -> list[Share]:
        """The sources, opened.

        Raises:
            InputError: a path is not there, or --data_split leaves nothing to this step.
        """
        weights, part = phase_weights(self.data_split, self.purpose)
        blend_weights = self.blend_weights or [None] * len(self.paths)
        shares = [
            Share(open_source(path, self.config_name, self.flag, streams=self.streams), weights, part, blend_weight)
            for path, blend_weight in zip(self.paths, blend_weights, strict=True)
        ]
        return shares + [
            Share(open_source(path, flag="--sft_only_data_path", streams=self.streams), (1.0,), 0)
            for path in self.undivided
        ]

    def check(self) -> None:
        """Look at the data before any model is loaded: paths exist, first rows parse and have what the purpose needs.

        Cheap: the first rows of every file; for a hub data set, only whether it is available at all. Every row is
        checked by `build_datasets`.

        Raises:
            InputError: naming the flag, or the file and the row.
        """
        if self.filters.deduplicate == "near":
            minhash_library()
        for source in (share.source for share in self.shares):
            if isinstance(source, HubSource):
                if not is_reachable():
                    source.fingerprint()
                continue
            for file in (*source.training, *source.held_out):
                if self.streams:
                    next(stream_rows(file), None)  # refuses what can only be read whole, before it is
                alone = LocalSource(source.label, (file,), (), source.copy_of, streams=self.streams)
                examples = read_examples(alone, "train", self.purpose, Counter(), **self.reading)
                for _ in itertools.islice(examples, CHECKED_ROWS):
                    pass
