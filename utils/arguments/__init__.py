"""The flags of every step: what a flag is, blocks of them by subject, and from a command line to a Config.

Nothing here imports torch, so that a command line is read and refused at once.
"""

from utils.arguments.base import Arguments, flag
from utils.arguments.rules import refuse_unavailable, remarks
from utils.arguments.run import parse_config, parse_first, run, save_config
from utils.arguments.steps import PpoConfig, RewardModelConfig, SftConfig, StepConfig

__all__ = [
    "Arguments",
    "PpoConfig",
    "RewardModelConfig",
    "SftConfig",
    "StepConfig",
    "flag",
    "parse_config",
    "parse_first",
    "refuse_unavailable",
    "remarks",
    "run",
    "save_config",
]
