"""Flags for the scores of answers in step 3: where they come from, and how they are processed."""

from dataclasses import dataclass

from utils.arguments.base import Arguments, flag
from utils.arguments.choices import REWARD_SOURCES, described


@dataclass(kw_only=True)
class RewardSourceArguments(Arguments):
    """Reward."""

    reward_source: str = flag(
        "model", f"what scores the answers. {described(REWARD_SOURCES)}", choices=tuple(REWARD_SOURCES)
    )
    reward_model_name_or_path: str | None = flag(
        None, "the frozen reward model; if omitted, --critic_model_name_or_path", idle_unless="reward_source == model"
    )
    offload_reward_model: bool = flag(
        False, "keep the reward model in CPU memory", needs_gpu=True, idle_unless="reward_source == model"
    )
    normalize_scores: bool = flag(True, "normalise scores with the mean and standard deviation that step 2 stored")
    clip_reward_value: float = flag(5.0, "scores are clipped to plus or minus this", above=0)
    missing_eos_penalty: float = flag(
        1.0, "subtracted from the score of an answer that does not end within --max_answer_seq_len", at_least=0
    )
