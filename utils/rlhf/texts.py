"""Text for the language-modelling loss beside PPO (InstructGPT's ptx): an endless stream of batches."""

import itertools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import PpoConfig
from utils.data import Corpus, build_dataloader, build_datasets, collate_sft, endless, micro_batches
from utils.data.batches.sizes import sequence_tokens
from utils.parallel import distributed


class TextBatches:
    """The batches of the optimiser steps to come, none without `--unsupervised_dataset_name`.

    Attributes:
        keys: of the prepared rows, for a resumed run to compare.
        used: batches so far.
        report: what `data_report.json` says of the text, under "texts".
    """

    def __init__(self, config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._pad_id = config, tokenizer.pad_token_id
        self.keys: list[str] = []
        self.used = 0
        self.report: dict[str, Any] = {}
        self._loader = None
        if corpus := Corpus.of_texts(config):
            rows, _ = build_datasets(corpus, tokenizer)
            self.keys.append(rows.key)
            self.report["texts"] = rows.report
            self._loader = build_dataloader(
                rows,
                list,
                config.per_device_training_batch_size,
                shuffle=True,
                drop_last=True,
                seed=config.seed,
                size_flags="--per_device_training_batch_size",
            )
        self._batches = iter(())

    def start_at(self, used: int) -> None:
        """Continue after the first `used` batches."""
        self.used = used
        if self._loader is not None:
            self._batches = endless(self._loader, used)

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Collated micro-batches for one optimiser step, on this process's device."""
        rows = list(itertools.islice(self._batches, self._config.gradient_accumulation_steps))
        self.used += len(rows)
        parts = micro_batches(rows, self._config.max_tokens_per_batch, sequence_tokens)
        return [distributed.to_device(collate_sft(part, pad_id=self._pad_id)) for part in parts]
