"""Flags for LoRA."""

from dataclasses import dataclass

from utils.arguments.base import Arguments, flag
from utils.arguments.model import NO_DROPOUT

WITH_LORA = "*lora_dim"  # any flag whose name has this ending


@dataclass(kw_only=True)
class AdapterArguments(Arguments):
    """LoRA flags that every step shares."""

    lora_alpha: float = flag(
        0.0, "LoRA updates are scaled by alpha / dim; 0 = twice the dimension", at_least=0, idle_unless=WITH_LORA
    )
    lora_dropout: float = flag(
        0.0, "dropout in front of the LoRA matrices (not in PPO)", at_least=0, below=1, idle_unless=WITH_LORA
    )
    only_optimize_lora: bool = flag(
        False,
        "freeze everything but the LoRA matrices; a reward model's or critic's scalar head is trained nevertheless",
        idle_unless=WITH_LORA,
    )


@dataclass(kw_only=True)
class LoraArguments(AdapterArguments):
    """LoRA."""

    lora_dim: int = flag(0, "rank of the LoRA matrices; 0 = no LoRA", at_least=0)
    lora_module_name: str = flag(
        "",
        "parts of the names of linear layers to adapt, comma-separated, such as q_proj,k_proj; if omitted, all linear "
        "layers of the transformer (OPT's decoder.layers. matches nothing in LLaMA)",
        idle_unless="lora_dim",
    )
    lora_learning_rate: float = flag(5e-4, "learning rate of the LoRA matrices", above=0, idle_unless="lora_dim")


@dataclass(kw_only=True)
class RlhfLoraArguments(AdapterArguments):
    """LoRA."""

    actor_lora_dim: int = flag(0, "rank of the actor's LoRA matrices; 0 = no LoRA", at_least=0)
    actor_lora_module_name: str = flag(
        "",
        "parts of the names of the actor's linear layers to adapt, comma-separated; if omitted, all linear layers of "
        "the transformer (OPT's decoder.layers. matches nothing in LLaMA)",
        idle_unless="actor_lora_dim",
    )
    actor_lora_learning_rate: float = flag(
        5e-4, "learning rate of the actor's LoRA matrices", above=0, idle_unless="actor_lora_dim"
    )
    critic_lora_dim: int = flag(0, "rank of the critic's LoRA matrices; 0 = no LoRA", at_least=0)
    critic_lora_module_name: str = flag("", "the same for the critic", idle_unless="critic_lora_dim")
    critic_lora_learning_rate: float = flag(
        5e-4, "learning rate of the critic's LoRA matrices", above=0, idle_unless="critic_lora_dim"
    )
    lora_dropout: float = flag(
        0.0, "dropout in front of the LoRA matrices (not in PPO)", at_least=0, below=1, idle=NO_DROPOUT
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "not available yet: keep frozen weights in a lower precision",
        unavailable="leave it out, or shard the frozen weights with --actor_zero_stage 3",
    )
