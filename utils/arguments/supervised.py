"""Flags of steps 1 and 2, which train one model on rows of data."""

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


@dataclass(kw_only=True)
class DataArguments(CorpusArguments):
    """Data."""

    max_seq_len: int = flag(
        512, "tokens of prompt and response together; longer prompts lose their beginning", at_least=2
    )
    eval_samples: int = flag(0, "held-out rows to evaluate on; 0 = all", at_least=0)


@dataclass(kw_only=True)
class ModelArguments(Arguments):
    """Model."""

    model_name_or_path: str = flag(help="folder or hub name of the model to start from")
    tokenizer_name_or_path: str | None = flag(
        None, "folder, hub name or sentencepiece tokenizer.model; left out, the model's own tokenizer"
    )
    dropout: float | None = flag(
        None, "dropout everywhere in the model; left out, as the model says", at_least=0, below=1
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a hub model: only for authors that you trust"
    )


@dataclass(kw_only=True)
class OptimizationArguments(ScheduleArguments):
    """Optimisation."""

    per_device_train_batch_size: int = flag(16, "rows per process and micro-batch", at_least=1)
    per_device_eval_batch_size: int = flag(16, "rows per process and evaluation batch", at_least=1)
    learning_rate: float = flag(1e-3, "peak rate; full fine-tuning of a LLaMA wants 1e-5 to 2e-5", above=0)
    weight_decay: float = flag(0.0, "decoupled weight decay of the matrices (norms and biases have none)", at_least=0)


@dataclass(kw_only=True)
class SystemArguments(MachineArguments):
    """System."""

    zero_stage: ZeroStage = flag(
        0, "ZeRO: 1 shards optimiser states over the processes, 2 also gradients, 3 also parameters"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")


@dataclass(kw_only=True)
class LoraArguments(AdapterArguments):
    """LoRA."""

    lora_dim: int = flag(0, "rank of the LoRA matrices; 0 = no LoRA", at_least=0)
    lora_module_name: str = flag(
        "",
        "parts of the names of linear layers to adapt, comma-separated, such as q_proj,k_proj; left out, all linear "
        "layers of the transformer (not OPT's decoder.layers., which matches nothing in LLaMA)",
    )
    lora_learning_rate: float = flag(5e-4, "learning rate of the LoRA matrices", above=0)


@dataclass(kw_only=True)
class SftArguments(Arguments):
    """Supervised fine-tuning."""

    sft_only_data_path: list[str] = flag([], "further data for this step only, of which all rows are used")
    packing: bool = flag(
        False,
        "fill rows of --max_seq_len tokens with several examples, which do not see each other; "
        "--per_device_train_batch_size then counts such rows",
    )
    eval_interval: int = flag(0, "optimiser steps between evaluations; 0 = only before and after", at_least=0)
    num_sample_generations: int = flag(3, "held-out prompts whose answers are shown before and after", at_least=0)
    sample_max_new_tokens: int = flag(64, "tokens of such an answer", at_least=1)
    print_loss: bool = flag(False, "print the loss of every step on a line of its own")


@dataclass(kw_only=True)
class RewardArguments(Arguments):
    """Reward model."""

    reward_loss: Literal["last_token", "token_span"] = flag(
        "last_token",
        "log-sigmoid of the score difference at the last response token, or its mean over the tokens from the first "
        "difference of the two responses, as DeepSpeed-Chat has it",
    )
    eval_interval: int = flag(0, "optimiser steps between evaluations; 0 = only before and after", at_least=0)
    eval_iters: int = flag(100, "batches of an evaluation during training; before and after, all", at_least=1)
    num_padding_at_beginning: int = flag(
        0, "accepted for old scripts (theirs: 1 for OPT, wrong for LLaMA): attention masks tell", at_least=0
    )
