"""The flags of every step: what a flag is, blocks of flags by subject, and parsing a command line into a Config.

Nothing here imports torch, so that a bad command line is refused immediately.
"""

from utils.arguments.base import Arguments, flag
from utils.arguments.rules import refuse_unavailable, remarks
from utils.arguments.run import parse_config, parse_first, run, save_config
from utils.arguments.steps import DpoConfig, PpoConfig, RewardModelConfig, SftConfig, StepConfig

__all__ = [
    "Arguments",
    "DpoConfig",
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
