"""Flags for the answers of the actor: how many, how they are sampled, and which engine generates them."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.errors import InputError

LEAST_TEMPERATURE = 1e-3  # below this, logits divided by it overflow


@dataclass(kw_only=True)
class RolloutArguments(Arguments):
    """Rollout: answers that the actor generates."""

    per_device_generation_batch_size: int = flag(
        16,
        "prompts per process and generation batch",
        at_least=1,
        aliases=["per_device_train_batch_size"],
        resume="regroup",
        rows_with=["generation_batches"],
    )
    generation_batches: int = flag(
        1,
        "generation batches that make up a rollout; a rollout smaller than an optimiser step grows to its size",
        at_least=1,
        aliases=["generation_batch_numbers"],
        resume="regroup",
    )
    max_prompt_seq_len: int = flag(256, "tokens of a prompt; longer ones lose their beginning", at_least=1)
    max_answer_seq_len: int = flag(256, "tokens of an answer, at most", at_least=1)
    min_new_tokens: int = flag(
        0, "tokens of an answer, at least: no EOS is sampled before. Above 0 it biases PPO: see --top_p", at_least=0
    )
    stop_strings: list[str] = flag(
        [],
        "texts that end an answer as EOS does, such as a user's next turn; the answer then counts as complete",
    )
    temperature: float = flag(
        1.0, "sampling temperature; the log-probs that PPO compares use it too", at_least=LEAST_TEMPERATURE
    )
    top_k: int = flag(0, "sample from this many most likely tokens; 0 = all. Biases PPO: see --top_p", at_least=0)
    top_p: float = flag(
        1.0,
        "sample from the most likely tokens of this total probability. Below 1 it biases PPO: answers are drawn from "
        "another distribution than the one whose probabilities form PPO's ratio",
        above=0,
        at_most=1,
    )
    eval_prompts: int = flag(
        64, "held-out prompts whose answers are scored before and after training; 0 = none", at_least=0
    )
    eval_interval: int = flag(
        0, "rollouts between these evaluations during training; 0 = only before and after", at_least=0, resume="free"
    )
    print_answers: bool = flag(False, "show prompts and answers of a rollout", resume="free")
    print_answers_interval: int = flag(1, "rollouts from one such display to the next", at_least=1, resume="free")

    def check(self) -> None:
        if not self.eval_prompts and (self.eval_interval or getattr(self, "keep_best", False)):
            raise InputError("--eval_interval and --keep_best score held-out prompts: --eval_prompts must not be 0")
        if self.min_new_tokens > self.max_answer_seq_len:
            raise InputError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_answer_seq_len {self.max_answer_seq_len}"
            )
        if not all(self.stop_strings):
            raise InputError("--stop_strings: an empty text would end every answer immediately; leave it out")


@dataclass(kw_only=True)
class GenerationArguments(Arguments):
    """Generation: the decode engine."""

    enable_hybrid_engine: bool = flag(
        True,
        "generate with the decode engine (LLaMA), on the training weights; if off, and for other architectures, use "
        "transformers' generate",
    )
    generation_cuda_graphs: bool = flag(
        True, "NVIDIA GPU: the decode engine records its steps as CUDA graphs; only with whole weights on each process"
    )
    lora_generation: Literal["fused", "unfused"] = flag(
        "fused",
        "how the decode engine applies LoRA: merged into copies of the adapted matrices (less work per token), "
        "or computed beside them (no copies); never merged into the training weights",
        idle_unless="actor_lora_dim",
    )
    stream_generation_weights: Literal["auto", "on", "off"] = flag(
        "auto",
        "ZeRO-3: gather the actor's layers one at a time for every token (slow, little memory) rather than all of them "
        "once per rollout; auto does so when all would not fit",
        idle_unless="actor_zero_stage == 3",
    )
    unpin_actor_parameters: bool = flag(
        False,
        "free the decode engine's copies of weights (joined, adapted or sharded matrices) after generation; otherwise "
        "they stay allocated and are refilled: less work per rollout, more memory in training",
        idle_unless="enable_hybrid_engine",
    )
    release_inference_cache: bool = flag(
        False,
        "free the KV cache of generation during training",
        resume="free",
        idle_unless="enable_hybrid_engine",
    )
    offload_optimizer_during_generation: bool = flag(
        False,
        "GPU: keep the actor's optimiser state in CPU memory during generation",
        needs_gpu=True,
        idle_unless="not offload",
    )
    inference_tp_size: int = flag(
        1,
        "ZeRO-3: number of neighbouring processes that generate together by tensor parallelism, each with its shard of "
        "every matrix; must divide the numbers of heads, key-value heads, MLP columns and processes",
        at_least=1,
    )
    tp_gather_partition_size: int = flag(
        8, "layers gathered at a time for tensor parallelism", at_least=1, idle_unless="inference_tp_size > 1"
    )

    def check(self) -> None:
        if self.inference_tp_size == 1:
            return
        asked = f"--inference_tp_size {self.inference_tp_size}"
        if not self.enable_hybrid_engine:
            raise InputError(f"{asked} needs the decode engine: leave out --no_enable_hybrid_engine")
        if self.actor_zero_stage != 3:
            raise InputError(f"{asked} needs a partitioned actor: give --actor_zero_stage 3, or leave it out")
        if self.stream_generation_weights == "on":
            raise InputError(f"{asked} and --stream_generation_weights on exclude each other: leave out one of them")
