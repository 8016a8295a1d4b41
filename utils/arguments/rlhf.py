"""Flags of step 3, which trains an actor and a critic on answers of the actor."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.arguments.shared import (
    AdapterArguments,
    CorpusArguments,
    MachineArguments,
    ScheduleArguments,
    ZeroStage,
)
from utils.errors import InputError


@dataclass(kw_only=True)
class PromptArguments(CorpusArguments):
    """Data."""

    unsupervised_dataset_name: str | None = flag(
        None,
        "text for a language-modelling loss beside PPO (InstructGPT's ptx), which keeps the model's other abilities",
    )
    unsupervised_dataset_config_name: str | None = flag(
        None, "configuration of that data set, such as wikitext-2-raw-v1"
    )
    unsup_coef: float = flag(27.8, "weight of the ptx loss", at_least=0)
    preprocessing_num_workers: int | None = flag(
        None, "accepted for old scripts: one process per machine tokenises, once, into the cache", at_least=1
    )


@dataclass(kw_only=True)
class RlhfModelArguments(Arguments):
    """Models."""

    actor_model_name_or_path: str = flag(help="the model of step 1; the reference of the KL penalty as well")
    critic_model_name_or_path: str = flag(help="the model of step 2; the frozen reward model as well")
    tokenizer_name_or_path: str | None = flag(
        None, "folder, hub name or sentencepiece tokenizer.model; left out, the actor's own tokenizer"
    )
    actor_dropout: float | None = flag(None, "accepted for old scripts: PPO runs without dropout", at_least=0, below=1)
    critic_dropout: float | None = flag(None, "accepted for old scripts: PPO runs without dropout", at_least=0, below=1)
    num_padding_at_beginning: int = flag(
        0, "accepted for old scripts (theirs: 1 for OPT, wrong for LLaMA): attention masks tell", at_least=0
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a hub model: only for authors that you trust"
    )


@dataclass(kw_only=True)
class RolloutArguments(Arguments):
    """Rollout: answers that the actor gives."""

    per_device_generation_batch_size: int = flag(
        16, "prompts per process and generation batch", at_least=1, aliases=["per_device_train_batch_size"]
    )
    generation_batches: int = flag(
        1, "generation batches that make up a rollout", at_least=1, aliases=["generation_batch_numbers"]
    )
    max_prompt_seq_len: int = flag(256, "tokens of a prompt; longer ones lose their beginning", at_least=1)
    max_answer_seq_len: int = flag(256, "tokens of an answer, at most", at_least=1)
    min_new_tokens: int = flag(
        0, "tokens of an answer, at least: no EOS is drawn before. Above 0 it biases PPO: see --top_p", at_least=0
    )
    stop_strings: list[str] = flag(
        [],
        "texts that end an answer, which then counts as complete, such as a user's next turn, beside the EOS",
    )
    temperature: float = flag(1.0, "sampling temperature; the log-probs that PPO compares use it too", above=0)
    top_k: int = flag(0, "sample among this many most likely tokens; 0 = all. Biases PPO: see --top_p", at_least=0)
    top_p: float = flag(
        1.0,
        "sample among the most likely tokens of this total probability. Below 1, answers are drawn from another "
        "distribution than the one that PPO's ratio is about",
        above=0,
        at_most=1,
    )
    eval_prompts: int = flag(
        64, "held-out prompts whose answers are scored before and after training; 0 = none", at_least=0
    )
    eval_interval: int = flag(
        0, "rollouts between such evaluations during training; 0 = only before and after", at_least=0
    )
    print_answers: bool = flag(False, "show prompts and answers of a rollout")
    print_answers_interval: int = flag(1, "rollouts between two such shows", at_least=1)

    def check(self) -> None:
        if not self.eval_prompts and (self.eval_interval or getattr(self, "keep_best", False)):
            raise InputError("--eval_interval and --keep_best score held-out prompts: --eval_prompts must not be 0")
        if self.min_new_tokens > self.max_answer_seq_len:
            raise InputError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_answer_seq_len {self.max_answer_seq_len}"
            )
        if not all(self.stop_strings):
            raise InputError("--stop_strings: an empty text would end every answer at once; leave it out")


@dataclass(kw_only=True)
class PpoOptimizationArguments(ScheduleArguments):
    """Optimisation."""

    per_device_training_batch_size: int = flag(
        16, "sequences per process and PPO micro-batch", at_least=1, aliases=["per_device_mini_train_batch_size"]
    )
    ppo_epochs: int = flag(1, "passes over a rollout", at_least=1)
    actor_learning_rate: float = flag(9.65e-6, "peak rate of the actor", above=0)
    critic_learning_rate: float = flag(5e-6, "peak rate of the critic", above=0)
    actor_weight_decay: float = flag(0.0, "decoupled weight decay of the actor's matrices", at_least=0)
    critic_weight_decay: float = flag(0.0, "decoupled weight decay of the critic's matrices", at_least=0)
    num_warmup_steps: int = flag(100, "optimiser steps over which the learning rates rise from 0", at_least=0)
    critic_warmup_steps: int = flag(0, "rollouts at the beginning from which only the critic learns", at_least=0)


@dataclass(kw_only=True)
class PpoArguments(Arguments):
    """PPO: the constants of the algorithm."""

    kl_ctl: float = flag(0.1, "weight of the KL penalty against the reference model", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = flag(
        "k1", "estimator of the KL: log-ratio, half its square, or ratio - 1 - log"
    )
    kl_clamp: float = flag(10.0, "the KL of a token is clamped to plus or minus this", above=0)
    kl_target: float | None = flag(
        None, "adapt --kl_ctl so that the KL per answer comes to this; left out, fixed", above=0
    )
    kl_horizon: int = flag(10000, "answers over which --kl_target takes effect", at_least=1)
    normalize_scores: bool = flag(True, "normalise scores with the mean and deviation that step 2 measured and stored")
    clip_reward_value: float = flag(5.0, "scores are clipped to plus or minus this", above=0)
    missing_eos_penalty: float = flag(
        1.0, "taken off the score of an answer that does not end within --max_answer_seq_len", at_least=0
    )
    gamma: float = flag(1.0, "discount of later rewards", at_least=0, at_most=1)
    lam: float = flag(0.95, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    whiten_advantages: bool = flag(
        True, "bring advantages to mean 0 and deviation 1 over the whole rollout of all processes"
    )
    whiten_rewards: bool = flag(False, "bring rewards to deviation 1, keeping their mean")
    cliprange: float = flag(0.2, "clip of the policy ratio", above=0)
    cliprange_value: float = flag(0.2, "clip of the change of a value", above=0)
    entropy_coef: float = flag(0.0, "weight of an entropy bonus", at_least=0)
    enable_ema: bool = flag(False, "keep a moving average of the actor's weights and save it as well, in actor_ema")
    ema_decay: float = flag(0.992, "decay of that average", above=0, below=1)


@dataclass(kw_only=True)
class RlhfSystemArguments(MachineArguments):
    """System."""

    actor_zero_stage: ZeroStage = flag(
        0, "ZeRO stage of the actor: 1 shards optimiser states, 2 also gradients, 3 also parameters"
    )
    critic_zero_stage: ZeroStage = flag(0, "ZeRO stage of the critic")
    actor_gradient_checkpointing: bool = flag(False, "recompute the actor's activations: less memory, more time")
    critic_gradient_checkpointing: bool = flag(False, "recompute the critic's activations: less memory, more time")
    offload_reference_model: bool = flag(False, "keep the reference model in CPU memory")
    offload_reward_model: bool = flag(False, "keep the reward model in CPU memory")
    enable_hybrid_engine: bool = flag(
        True,
        "generate with the decode engine (LLaMA), on the training weights; off, or for other architectures, with "
        "transformers' generate",
    )
    generation_cuda_graphs: bool = flag(
        True, "NVIDIA GPU: the decode engine records its steps as CUDA graphs; one process's whole weights only"
    )
    lora_generation: Literal["fused", "unfused"] = flag(
        "fused",
        "how the decode engine applies LoRA: merged into copies of the adapted matrices (less work per token), "
        "or computed beside them (no copies); never merged into the training weights",
    )
    stream_generation_weights: Literal["auto", "on", "off"] = flag(
        "auto",
        "ZeRO-3: gather the actor's layers one at a time for every token (slow, little memory) rather than all of them "
        "once per rollout; auto does so when they would not fit",
    )
    unpin_actor_parameters: bool = flag(
        False,
        "free the decode engine's copies of weights (joined, adapted or divided matrices) after generation; otherwise "
        "they stay allocated and are refilled: less work per rollout, more memory in training",
    )
    release_inference_cache: bool = flag(False, "give the generation cache back during training")
    offload_optimizer_during_generation: bool = flag(
        False, "GPU: the actor's optimiser state waits in CPU memory while it generates"
    )
    inference_tp_size: int = flag(
        1,
        "ZeRO-3: neighbouring processes that share the actor in generation, each with its part of every matrix; must "
        "divide heads, key-value heads, MLP columns and processes",
        at_least=1,
    )
    tp_gather_partition_size: int = flag(8, "layers gathered at a time for such sharing", at_least=1)
    align_overflow: bool = flag(
        False, "fp16: skip an optimiser step of actor and critic together when either overflows"
    )
    enable_test_mode: bool = flag(False, "stop after --test_stop_step rollouts")
    test_stop_step: int = flag(0, "rollouts in test mode", at_least=0)

    def check(self) -> None:
        if self.enable_test_mode and not self.test_stop_step:
            raise InputError("--enable_test_mode needs to know when to stop: give --test_stop_step")
        if self.inference_tp_size > 1:
            self._check_tensor_parallel()

    def _check_tensor_parallel(self) -> None:
        asked = f"--inference_tp_size {self.inference_tp_size}"
        if not self.enable_hybrid_engine:
            raise InputError(f"{asked} needs the decode engine: leave out --no_enable_hybrid_engine")
        if self.actor_zero_stage != 3:
            raise InputError(f"{asked} shares a partitioned actor: give --actor_zero_stage 3, or leave it out")
        if self.stream_generation_weights == "on":
            raise InputError(f"{asked} and --stream_generation_weights on exclude each other: leave out one of them")


@dataclass(kw_only=True)
class RlhfLoraArguments(AdapterArguments):
    """LoRA."""

    actor_lora_dim: int = flag(0, "rank of the actor's LoRA matrices; 0 = no LoRA", at_least=0)
    actor_lora_module_name: str = flag(
        "",
        "parts of the names of the actor's linear layers to adapt, comma-separated; left out, all linear layers of the "
        "transformer (not OPT's decoder.layers., which matches nothing in LLaMA)",
    )
    actor_lora_learning_rate: float = flag(5e-4, "learning rate of the actor's LoRA matrices", above=0)
    critic_lora_dim: int = flag(0, "rank of the critic's LoRA matrices; 0 = no LoRA", at_least=0)
    critic_lora_module_name: str = flag("", "the same for the critic")
    critic_lora_learning_rate: float = flag(5e-4, "learning rate of the critic's LoRA matrices", above=0)
    enable_mixed_precision_lora: bool = flag(False, "not available yet: keep frozen weights in a shorter number format")
