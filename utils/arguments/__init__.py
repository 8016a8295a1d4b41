"""The flags of every step, in blocks that a step's `Config` inherits from."""

from utils.arguments.availability import meaningless_flags, refuse_unavailable
from utils.arguments.base import Arguments, flag
from utils.arguments.rlhf import (
    PpoArguments,
    PpoOptimizationArguments,
    PromptArguments,
    RlhfLoraArguments,
    RlhfModelArguments,
    RlhfSystemArguments,
    RolloutArguments,
)
from utils.arguments.shared import CheckpointArguments, OutputArguments, TokenizerArguments
from utils.arguments.supervised import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    RewardArguments,
    SftArguments,
    SystemArguments,
)

__all__ = [
    "Arguments",
    "CheckpointArguments",
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizationArguments",
    "OutputArguments",
    "PpoArguments",
    "PpoOptimizationArguments",
    "PromptArguments",
    "RewardArguments",
    "RlhfLoraArguments",
    "RlhfModelArguments",
    "RlhfSystemArguments",
    "RolloutArguments",
    "SftArguments",
    "SystemArguments",
    "TokenizerArguments",
    "flag",
    "meaningless_flags",
    "refuse_unavailable",
]
