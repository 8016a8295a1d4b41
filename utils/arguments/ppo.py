"""Flags for the constants of PPO."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.arguments.choices import ADVANTAGE_ESTIMATORS, described


@dataclass(kw_only=True)
class PpoArguments(Arguments):
    """PPO: the constants of the algorithm."""

    advantage_estimator: str = flag(
        "gae",
        f"how rewards become advantages. {described(ADVANTAGE_ESTIMATORS)}",
        choices=tuple(ADVANTAGE_ESTIMATORS),
    )
    kl_ctl: float = flag(0.1, "weight of the KL penalty against the reference model", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = flag(
        "k1", "estimator of the KL: log-ratio, half its square, or ratio - 1 - log"
    )
    kl_clamp: float = flag(10.0, "the KL of a token is clamped to plus or minus this", above=0)
    kl_target: float | None = flag(
        None, "adapt --kl_ctl so that the KL per answer comes to this; left out, fixed", above=0
    )
    kl_horizon: int = flag(10000, "answers over which --kl_target takes effect", at_least=1, idle_unless="kl_target")
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
    ema_decay: float = flag(0.992, "decay of that average", above=0, below=1, idle_unless="enable_ema")
