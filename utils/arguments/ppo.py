"""Flags for the hyperparameters of PPO, and for the scores of its answers."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.arguments.choices import ADVANTAGE_ESTIMATORS, REWARD_SOURCES, described


@dataclass(kw_only=True)
class PpoArguments(Arguments):
    """PPO: the hyperparameters of the algorithm."""

    advantage_estimator: str = flag(
        "gae",
        f"how rewards become advantages. {described(ADVANTAGE_ESTIMATORS)}",
        choices=tuple(ADVANTAGE_ESTIMATORS),
    )
    kl_ctl: float = flag(0.1, "KL coefficient: weight of the KL penalty against the reference model", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = flag(
        "k1",
        "estimator of the KL per token: k1 log-ratio, k2 half its square, k3 exp(-log-ratio) - 1 + log-ratio. Only k1 "
        "makes the penalty in the reward follow the gradient of the KL; k2 and k3 estimate its size",
    )
    kl_clamp: float = flag(10.0, "the KL of a token is clamped to plus or minus this", above=0)
    kl_target: float | None = flag(
        None, "adapt --kl_ctl so that the KL per answer approaches this; if omitted, it is fixed", above=0
    )
    kl_horizon: int = flag(10000, "horizon of that adaptation, in answers", at_least=1, idle_unless="kl_target")
    gamma: float = flag(1.0, "discount of later rewards", at_least=0, at_most=1)
    lam: float = flag(0.95, "lambda of generalised advantage estimation", at_least=0, at_most=1)
    whiten_advantages: bool = flag(
        True, "scale advantages to mean 0 and standard deviation 1 over the whole rollout of all processes"
    )
    whiten_rewards: bool = flag(False, "scale rewards to standard deviation 1, keeping their mean")
    cliprange: float = flag(0.2, "clip range of the policy ratio", above=0)
    cliprange_value: float = flag(0.2, "clip range of the change of a value", above=0)
    entropy_coef: float = flag(0.0, "weight of an entropy bonus", at_least=0)
    enable_ema: bool = flag(False, "keep a moving average of the actor's weights and save it as well, in actor_ema")
    ema_decay: float = flag(0.992, "decay of that average", above=0, below=1, idle_unless="enable_ema")


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
