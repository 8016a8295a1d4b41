"""What happens when a loss or a gradient is NaN or infinite: the run stops, or the step is skipped; a file tells."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import distributed
from utils.errors import DivergenceError
from utils.files import atomic_write_text
from utils.metrics import METRICS_FILE, read_metrics

DIVERGENCE_FILE = "divergence.json"
DIVERGENCE_ADVICE = (
    "Likely causes: a learning rate that is too high, or 16-bit overflow. Lower --learning_rate (step 3: "
    "--actor_learning_rate, --critic_learning_rate), add --num_warmup_steps, or use --dtype bf16 or fp32"
)
MOST_ROWS = 64


def check_finite(loss: float, what: str) -> None:
    """Raise `DivergenceError` when `loss`, which all ranks share so that all raise, is NaN or infinite."""
    if not math.isfinite(loss):
        raise DivergenceError(f"{what}: the loss is {loss}. {DIVERGENCE_ADVICE}")


@dataclass(frozen=True)
class DivergenceGuard:
    """What the flags say about it: `on_nan` "stop" or "skip"; `output_dir` of the file, None for no file."""

    on_nan: str = "stop"
    output_dir: str | None = None

    def report(self, what: str, loss: float, norm: float, micro_batches: Sequence, losses: Sequence[float]) -> None:
        """Write `divergence.json` from the first rank whose own loss is not finite, then stop unless steps are skipped.

        Args:
            what: names the step. `loss` and gradient `norm` are those of all ranks.
            losses: of this rank's `micro_batches`, one for each that was computed.

        Raises:
            DivergenceError: `on_nan` is "stop"; on every rank.
        """
        guilty = [batch for batch, value in zip(micro_batches, losses) if not math.isfinite(value)]
        rank, world = distributed.rank(), distributed.world_size()
        first = int(distributed.all_reduce_scalar(rank if guilty else world, "min")) % world
        if self.output_dir and rank == first:
            folder = Path(self.output_dir)
            logged = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
            content = {
                "step": what,
                "rank": rank,
                "loss": str(loss),
                "gradient_norm": str(norm),
                "last_metrics": logged[-1] if logged else {},
                "rows": [ids for batch in guilty or micro_batches for ids in _token_ids(batch)][:MOST_ROWS],
            }
            atomic_write_text(folder / DIVERGENCE_FILE, json.dumps(content) + "\n")
        if self.on_nan == "stop":
            check_finite(loss, what)
            raise DivergenceError(f"{what}: the gradient norm is {norm}. {DIVERGENCE_ADVICE}")


def _token_ids(batch) -> list[list[int]]:
    """The rows of a micro-batch, without padding: a collated dictionary or an `Experience`."""
    is_dictionary = isinstance(batch, dict)
    ids: torch.Tensor = batch["input_ids"] if is_dictionary else batch.sequences
    mask: torch.Tensor = (batch["attention_mask"] if is_dictionary else batch.attention_mask).bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask)]
