"""Stopping and resuming: checkpoints of a whole run, bit for bit, and the signals that ask for one."""

from utils.checkpoints.checkpoints import Checkpoints
from utils.checkpoints.run_state import RunState

__all__ = ["Checkpoints", "RunState"]
