"""What happens when a loss, a gradient or a weight is NaN or infinite: the run stops, or the step is skipped."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.errors import DivergenceError
from utils.files import atomic_write_text
from utils.output.metrics import METRICS_FILE, read_metrics
from utils.parallel import distributed
from utils.parallel.zero import is_partitioned

DIVERGENCE_FILE = "divergence.json"
DIVERGENCE_ADVICE = (
    "Likely causes: a learning rate that is too high, or 16-bit overflow. Lower --learning_rate (step 3: "
    "--actor_learning_rate, --critic_learning_rate), add --num_warmup_steps, or use --dtype bf16 or fp32"
)
MOST_ROWS = 64

TokenIds = list[list[int]]


def check_finite(loss: float, what: str) -> None:
    """Raise `DivergenceError` when `loss` is NaN or infinite; it must be equal on all ranks, so that all raise."""
    if not math.isfinite(loss):
        raise DivergenceError(f"{what}: the loss is {loss}. {DIVERGENCE_ADVICE}")


@torch.no_grad()
def check_weights(model: torch.nn.Module) -> None:
    """Raise `DivergenceError` on all ranks when any of them holds a weight that is NaN or infinite."""
    tensors = (parameter.ds_tensor if is_partitioned(parameter) else parameter for parameter in model.parameters())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    if not distributed.all_reduce_scalar(float(finite), "min"):
        raise DivergenceError(f"the trained weights hold NaN or infinite values; not saved. {DIVERGENCE_ADVICE}")


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TokenIds:
    """The ids of each row of a (B, T) batch, without padding."""
    return [row[kept].tolist() for row, kept in zip(input_ids, attention_mask.bool())]


def collated_tokens(batch: dict[str, torch.Tensor]) -> TokenIds:
    """`real_tokens` of a collated batch."""
    return real_tokens(batch["input_ids"], batch["attention_mask"])


@dataclass(frozen=True)
class DivergenceGuard:
    """The settings for it: `on_nan` is "stop" or "skip"; `output_dir` is the folder of the file, None for no file.

    Args:
        tokens_of: returns the token ids of a micro-batch, for the file.
    """

    on_nan: str = "stop"
    output_dir: str | None = None
    tokens_of: Callable[[Any], TokenIds] = collated_tokens

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
                "rows": [ids for batch in guilty or micro_batches for ids in self.tokens_of(batch)][:MOST_ROWS],
            }
            atomic_write_text(folder / DIVERGENCE_FILE, json.dumps(content) + "\n")
        if self.on_nan == "stop":
            check_finite(loss, what)
            raise DivergenceError(f"{what}: the gradient norm is {norm}. {DIVERGENCE_ADVICE}")
