"""The reference of direct preference optimisation: the log-probabilities of the model before training.

They are computed once, by the model that is about to train, before its first step, and kept in the data cache: training
holds one model. With `--reference_logprobs live` they are computed in every step, by the model with its adapters off
where these are all that trains, and else by a frozen second model.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from utils.arguments.roles import RoleFlags
from utils.arguments.steps import DpoConfig
from utils.data.batches.collate import Batch
from utils.data.rows.cache import cached_folder, key_of, private_folder
from utils.data.rows.dataset import TokenDataset
from utils.models.engine import build_frozen_engine
from utils.models.lora import adapters_off
from utils.models.weight_files import weights_digest
from utils.parallel import distributed
from utils.parallel.zero import Engine
from utils.preference.answers import read_answers
from utils.preference.mates import MatedRows

FILE = "logprobs.safetensors"
Rows = TokenDataset | MatedRows
Collate = Callable[[Sequence[dict[str, Any]]], Batch]


class KnownRows(Dataset):
    """Rows with their "reference_logprobs", [answer][part] as in `answers.Answers`.

    Args:
        logprobs: (rows of all epochs, 2, 2).
    """

    def __init__(self, rows: Rows, logprobs: torch.Tensor) -> None:
        self._rows, self._logprobs = rows, logprobs
        self.set_epoch = rows.set_epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index] | {"reference_logprobs": self._logprobs[self._rows.number(index)].tolist()}


class Reference:
    """Adds the reference's log-probabilities to rows (`known`) or to batches (`add`), whichever `config` asks for.

    Args:
        engine: the model that trains, before its first step and before a checkpoint is loaded.
        roles: of the plan; "reference" among them is a frozen second model.
    """

    def __init__(
        self,
        config: DpoConfig,
        engine: Engine,
        roles: dict[str, RoleFlags],
        tokenizer: PreTrainedTokenizerBase,
        collate: Collate,
    ) -> None:
        self._config, self._engine, self._collate = config, engine, collate
        self._live = config.needs_reference and config.reference_logprobs == "live"
        self._path = roles["model"].path
        frozen = roles.get("reference")
        self._frozen = build_frozen_engine(frozen, tokenizer, config) if frozen else None

    @property
    def frozen(self) -> list[torch.nn.Module]:
        """Models that are only read."""
        return [self._frozen.module] if self._frozen else []

    def known(self, rows: Rows, part: str) -> Rows | KnownRows:
        """`rows` with the log-probabilities, from the cache or computed now; unchanged where they are not needed so.

        Every rank must call it.

        Args:
            part: the name of the rows among those of the same key, for the cache.
        """
        if self._live or not self._config.needs_reference:
            return rows
        whole = rows.of_all_epochs()
        key = self._key(whole, part)
        cache = private_folder(self._config.data_output_path)
        if distributed.all_reduce_scalar(float((cache / key / FILE).is_file()), "min"):
            return KnownRows(rows, load_file(cache / key / FILE)["logprobs"])
        logprobs = self._compute(whole, part)
        if distributed.local_rank() == 0:
            cached_folder(cache, key, lambda folder: _write(folder, logprobs), is_writer=True)
        return KnownRows(rows, logprobs)

    def _key(self, rows: Rows, part: str) -> str:
        """All that the numbers depend on."""
        digest = weights_digest(self._path) if distributed.is_main() else ""
        digest = distributed.first_problem(digest or None) or ""  # what one rank says, on every rank
        config = self._config
        return key_of(
            {
                "reference": digest,
                "rows": [rows.key, part, len(rows)],
                "dtype": config.dtype,
                "new token": [config.add_eot_token, config.eot_token, config.seed] if config.add_eot_token else None,
            }
        )

    @torch.no_grad()
    def _compute(self, rows: Rows, part: str) -> torch.Tensor:
        """(rows, 2, 2) fp32; the rows are shared out over the ranks, in batches of similar length."""
        size, world = self._config.per_device_eval_batch_size, distributed.world_size()
        names = [name for name in ("prompt_ids", "chosen_ids", "response_ids") if name in rows[0]]
        lengths = [sum(row) for row in zip(*(rows.lengths(name) for name in names), strict=True)]
        order = sorted(range(len(rows)), key=lambda index: -lengths[index])
        mine = order[distributed.rank() :: world]
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        count = -(-len(order[::world]) // size)  # of rank 0, which has the most rows
        logprobs = torch.zeros(len(rows), 2, 2)
        self._engine.eval()
        wait = distributed.wait(f"reference log-probabilities of {part} rows, batches", count)
        for number in wait.over(range(count)):
            own = batches[number] if number < len(batches) else []
            batch = self._collate([rows[index] for index in own or order[-1:]])
            values = read_answers(self._engine, distributed.to_device(batch)).policy.cpu()
            if own:
                logprobs[own] = values
        self._engine.train()
        return distributed.all_reduce(logprobs)

    @torch.no_grad()
    def add(self, batch: Batch) -> Batch:
        """`batch` with "reference_logprobs", where they are computed live."""
        if not self._live:
            return batch
        engine = self._frozen or self._engine
        training = engine.module.training
        engine.eval()
        with contextlib.nullcontext() if self._frozen else adapters_off(engine.module):
            values = read_answers(engine, batch).policy
        engine.train(training)
        return batch | {"reference_logprobs": values}


def _write(folder: Path, logprobs: torch.Tensor) -> None:
    save_file({"logprobs": logprobs.contiguous()}, folder / FILE)
