"""The four models of PPO, each in its DeepSpeed engine.

actor   the policy that learns        starts from the SFT model (step 1)
ref     the SFT model, frozen         a model of its own, or the actor with its adapters off
critic  values, learns                starts from the reward model (step 2)
reward  scores whole responses        the reward model, frozen
"""

import contextlib
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from utils import distributed
from utils.checkpoints.best import BEST_FOLDER, is_best, store_score
from utils.models.checkpoint import save_model
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.models.lora import adapters_off
from utils.models.training_engine import build_engine
from utils.rlhf.decoder import LlamaDecoder
from utils.rlhf.ema import ExponentialMovingAverage
from utils.rlhf.experience import response_logprobs, response_values
from utils.rlhf.hybrid_engine import HybridEngine
from utils.zero import initialize_engine, zero_config


class RlhfEngine:
    """Builds and holds the engines. `config` is step 3's; `actor_steps` and `critic_steps` are their optimiser steps.

    Dropout is off in all four models, so that rollout and training compute the same log-probabilities.
    """

    def __init__(self, config, tokenizer: PreTrainedTokenizerBase, *, actor_steps: int, critic_steps: int):
        self.config, self.tokenizer = config, tokenizer
        training = {"micro_batch_size": config.per_device_training_batch_size, "dropout": 0.0}
        self.actor = build_engine(load_causal_lm, tokenizer, config, role="actor_", total_steps=actor_steps, **training)
        self.critic = build_engine(
            load_scalar_model, tokenizer, config, role="critic_", total_steps=critic_steps, **training
        )
        self.shares_reference = config.actor_lora_dim > 0 and config.only_optimize_lora
        self.ref = (
            None if self.shares_reference else self._frozen("actor", load_causal_lm, config.offload_reference_model)
        )
        self.reward = self._frozen("critic", load_scalar_model, config.offload_reward_model)
        self.hybrid = HybridEngine(self.actor, tokenizer, config)
        self.score_mean, self.score_std = self._score_scale()
        self.ema = ExponentialMovingAverage(self.actor.module, config.ema_decay) if config.enable_ema else None

    def _frozen(self, role: str, load, offload: bool):
        config = self.config
        offload = offload and torch.accelerator.is_available()
        stage = 3 if offload else getattr(config, f"{role}_zero_stage")  # parameters can only be offloaded at stage 3
        zero = zero_config(stage, config.dtype, offload=offload, trainable=False)
        model = load(
            getattr(config, f"{role}_model_name_or_path"),
            self.tokenizer,
            zero,
            dtype=config.dtype,
            dropout=0.0,
            trust_remote_code=config.trust_remote_code,
        )
        return initialize_engine(model, zero)

    @property
    def decoder(self) -> LlamaDecoder | None:
        """The decode engine; None where `transformers` generates."""
        return self.hybrid.decoder

    def _score_scale(self) -> tuple[float, float]:
        """Mean and standard deviation of chosen responses' scores as step 2 measured them; 0 and 1 without them."""
        if not self.config.normalize_scores:
            return 0.0, 1.0
        model_config = self.reward.module.model.config
        mean, deviation = getattr(model_config, "score_mean", None), getattr(model_config, "score_std", None)
        if mean is None or not deviation:  # zero is what a single held-out pair gives
            distributed.log(
                "note: the reward model's config.json has no score_mean and score_std above 0, as step 2 writes them: "
                "scores are not normalised"
            )
            return 0.0, 1.0
        return float(mean), float(deviation)

    @torch.no_grad()
    def reference_logprobs(self, sequences, attention_mask, response_mask, *, temperature: float) -> torch.Tensor:
        """`response_logprobs` of the SFT model, (B, R)."""
        with adapters_off(self.actor.module) if self.shares_reference else contextlib.nullcontext():
            policy = self.actor if self.shares_reference else self.ref
            return response_logprobs(policy, sequences, attention_mask, response_mask, temperature=temperature)[0]

    def values(self, sequences, attention_mask, response_mask) -> torch.Tensor:
        """`response_values` of the critic, (B, R), normalised as scores are.

        The critic starts as the reward model and keeps its scale, while the returns that it predicts are made of
        normalised scores: without this it would begin a whole mean score away from them.
        """
        values = response_values(self.critic, sequences, attention_mask, response_mask)
        return ((values - self.score_mean) / self.score_std).masked_fill(~response_mask, 0.0)

    def save_if_best(self, evaluated: dict[str, float]) -> None:
        """With --keep_best, `save` to `output_dir/best` if the score of held-out prompts beats all before.

        Every rank must call it.
        """
        output_dir = self.config.output_dir
        if self.config.keep_best and is_best(output_dir, evaluated["eval/score_mean"]):
            self.save(Path(output_dir) / BEST_FOLDER)
            store_score(output_dir, evaluated["eval/score_mean"])

    def save(self, output_dir: str | Path) -> None:
        """Write `actor/`, `critic/` and, with an average, `actor_ema/`. Every rank must call it."""
        output_dir, adapter = Path(output_dir), self.config.save_adapter
        actor, critic = self.actor.module.model, self.critic.module.model
        save_model(actor, self.tokenizer, output_dir / "actor", save_adapter=adapter and self.config.actor_lora_dim > 0)
        save_model(
            critic, self.tokenizer, output_dir / "critic", save_adapter=adapter and self.config.critic_lora_dim > 0
        )
        if self.ema:
            with self.ema.applied():
                save_model(actor, self.tokenizer, output_dir / "actor_ema")
        elif distributed.is_main():
            shutil.rmtree(output_dir / "actor_ema", ignore_errors=True)  # of an earlier run
