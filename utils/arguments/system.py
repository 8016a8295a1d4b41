"""Flags for number formats, ZeRO and the placement of tensors in memory."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.errors import InputError

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(kw_only=True)
class MachineArguments(Arguments):
    """System flags that every step shares."""

    dtype: Literal["bf16", "fp16", "fp32"] = flag(
        "bf16",
        "number format of the forward and backward pass; the optimiser keeps fp32 weights. bf16 rather than fp16, "
        "whose loss scale collapses in long RLHF runs; fp16 needs a GPU",
    )
    offload: bool = flag(False, "keep optimiser states (ZeRO-3: and parameters) in CPU memory", needs_gpu=True)
    compute_fp32_loss: bool = flag(
        False,
        "accepted for old scripts: losses are always computed in fp32",
        resume="free",
        idle="losses are always computed in fp32",
    )
    local_rank: int = flag(-1, "set by the launcher", at_least=-1, resume="free")
    deepspeed: bool = flag(False, "accepted for old scripts: training always runs on DeepSpeed", resume="free")


@dataclass(kw_only=True)
class SystemArguments(MachineArguments):
    """System."""

    zero_stage: ZeroStage = flag(
        0,
        "ZeRO: 1 shards optimiser states over the processes, 2 also gradients, 3 also parameters",
        resume="regroup",
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")


@dataclass(kw_only=True)
class RlhfSystemArguments(MachineArguments):
    """System."""

    actor_zero_stage: ZeroStage = flag(
        0,
        "ZeRO stage of the actor: 1 shards optimiser states, 2 also gradients, 3 also parameters",
        resume="regroup",
    )
    critic_zero_stage: ZeroStage = flag(0, "ZeRO stage of the critic", resume="regroup")
    actor_gradient_checkpointing: bool = flag(False, "recompute the actor's activations: less memory, more time")
    critic_gradient_checkpointing: bool = flag(False, "recompute the critic's activations: less memory, more time")
    offload_reference_model: bool = flag(False, "keep the reference model in CPU memory", needs_gpu=True)
    align_overflow: bool = flag(
        False,
        "fp16: skip an optimiser step of actor and critic together when either overflows",
        idle_unless="dtype == fp16",
    )
    enable_test_mode: bool = flag(False, "stop after --test_stop_step rollouts", resume="free")
    test_stop_step: int = flag(0, "rollouts in test mode", at_least=0, resume="free", idle_unless="enable_test_mode")

    def check(self) -> None:
        if self.enable_test_mode and not self.test_stop_step:
            raise InputError("--enable_test_mode needs to know when to stop: give --test_stop_step")
