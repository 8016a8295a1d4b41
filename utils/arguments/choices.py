"""Tables of what can be chosen by name on a command line. A new choice is one row here and the file that it names.

The code behind a choice is imported only when it is used, so that a command line can be parsed without it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row: where the code is, as `package.module:name`, and what it is in a few words."""

    code: str
    about: str

    def load(self) -> Callable:
        """The function or class that the row names."""
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Estimator(Choice):
    """How rewards become advantages. `code` is a function of a `utils.algorithms.advantages.RewardedTokens`."""

    needs_critic: bool


@dataclass(frozen=True, kw_only=True)
class Source(Choice):
    """What scores answers. `code` is a class as `utils.rewards.protocol.RewardSource` describes."""

    needs_reward_model: bool = False  # --reward_model_name_or_path, which is then one of the run's roles


PAIRWISE_LOSSES = {
    "last_token": Choice(
        code="utils.algorithms.reward_losses:last_token_loss",
        about="log-sigmoid of the score difference at the last response tokens",
    ),
    "token_span": Choice(
        code="utils.algorithms.reward_losses:token_span_loss",
        about="its mean over the tokens from the first difference of the two responses on, as in DeepSpeed-Chat",
    ),
}

REWARD_SOURCES = {
    "model": Source(
        code="utils.rewards.model:RewardModel", about="the reward model of step 2", needs_reward_model=True
    ),
}

ADVANTAGE_ESTIMATORS = {
    "gae": Estimator(
        code="utils.algorithms.advantages:generalized_advantages",
        about="generalised advantage estimation with a critic",
        needs_critic=True,
    ),
}


def described(table: dict[str, Choice]) -> str:
    """The rows of a table for a help text: "a: what it is; b: what it is"."""
    return "; ".join(f"{name}: {choice.about}" for name, choice in table.items())
