"""The models of PPO, each behind a handle with a few methods; callers need not know how they share weights.

actor       the policy that learns        starts from the SFT model (step 1)
reference   the SFT model, frozen         a separate model, or the actor with its adapters off
critic      values, learns                starts from the reward model (step 2); None where the estimator needs none

The reward is not among them: it scores answers, whatever wrote them (`utils.rewards`).
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.generation.hybrid_engine import HybridEngine
from utils.generation.micro_batches import MicroBatch
from utils.generation.responses import Responses
from utils.generation.sampling import SamplingParams
from utils.models.lora import adapters_off
from utils.models.saving import save_model
from utils.parallel import distributed, watchdog
from utils.parallel.zero import Engine
from utils.rlhf.ema import ExponentialMovingAverage
from utils.rlhf.experience import response_logprobs, response_values


@dataclass(frozen=True)
class Policy:
    """A language model.

    Attributes:
        uses_adapters: whether LoRA is applied; a base model and its adapted version may share an engine.
        saves_adapter: whether `save` writes the LoRA factors too.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    uses_adapters: bool = True
    saves_adapter: bool = False

    def logprobs(
        self, batch: MicroBatch, *, temperature: float, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`response_logprobs` of the batch, and entropies if asked for, (B, R) each."""
        with contextlib.nullcontext() if self.uses_adapters else adapters_off(self.engine.module):
            return response_logprobs(self.engine, batch, temperature=temperature, with_entropy=with_entropy)

    def save(self, folder: Path) -> None:
        """Write the model, LoRA merged. Every rank must call it."""
        save_model(self.engine.module.model, self.tokenizer, folder, save_adapter=self.saves_adapter)


@dataclass(frozen=True)
class Critic:
    """A model with a scalar head.

    Attributes:
        mean, std: of the scores of the model that it started from. Its values are normalised with them, as scores are
            with the reward's: otherwise they would start a whole mean score away from the returns.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    mean: float = 0.0
    std: float = 1.0
    saves_adapter: bool = False

    def values(self, batch: MicroBatch) -> torch.Tensor:
        """`response_values` of the batch, (B, R), normalised."""
        values = response_values(self.engine, batch)
        return ((values - self.mean) / self.std).masked_fill(~batch.response_mask, 0.0)

    def save(self, folder: Path) -> None:
        """Write the model, LoRA merged. Every rank must call it."""
        save_model(self.engine.module.model, self.tokenizer, folder, save_adapter=self.saves_adapter)


@dataclass(frozen=True)
class Roles:
    """The models of a run, as a layout has built them.

    Attributes:
        hybrid: writes the actor's answers.
        average: of the actor's weights, None without `--enable_ema`.
    """

    actor: Policy
    reference: Policy
    critic: Critic | None
    hybrid: HybridEngine
    average: ExponentialMovingAverage | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.actor.tokenizer

    @property
    def trained(self) -> Mapping[str, Engine]:
        """The engines that learn, by role."""
        return {"actor": self.actor.engine} | ({"critic": self.critic.engine} if self.critic else {})

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The models that are only read."""
        return [] if self.reference.engine is self.actor.engine else [self.reference.engine.module]

    @property
    def averages(self) -> Sequence[torch.Tensor]:
        """Tensors of this rank that change in training, other than the engines'."""
        return self.average.shadow if self.average else ()

    def respond(self, prompts: list[list[int]], sampling: SamplingParams, *, seed: int) -> Responses:
        """One answer of the current actor to each prompt. Every rank must call it."""
        watchdog.alive("generation")
        return self.hybrid.answer(prompts, sampling, seed=seed)

    def save(self, output_dir: str | Path) -> None:
        """Write `actor/`, `critic/` and, with an average, `actor_ema/`. Every rank must call it."""
        output_dir = Path(output_dir)
        self.actor.save(output_dir / "actor")
        if self.critic:
            self.critic.save(output_dir / "critic")
        if self.average:
            with self.average.applied():
                save_model(self.actor.engine.module.model, self.tokenizer, output_dir / "actor_ema")
        elif distributed.is_main():
            shutil.rmtree(output_dir / "actor_ema", ignore_errors=True)  # of an earlier run
