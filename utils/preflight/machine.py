"""What a process has: the device's memory, and what it uses before any model is loaded."""

import torch

from utils.parallel import distributed
from utils.parallel.memory import available_memory, resident_memory
from utils.preflight.phases import Machine

MIB = 2**20
LATER_LIBRARIES = 45 * MIB  # measured on a CPU: what torch, DeepSpeed and transformers load when training starts
DATA_LIBRARIES = 52 * MIB  # measured: what reading the data adds, for an estimate that does not read them
GPU_CONTEXT = 600 * MIB  # assumed, not measured: CUDA context, cuBLAS workspaces
GPU_COMMUNICATION = 500 * MIB  # assumed, not measured: NCCL's channels of a group of processes
GROUPS = 2  # groups of all processes: torch's own, and the one in which ZeRO reduces and gathers


def this_machine() -> Machine:
    """The machine that this process runs on, as one of the processes that share it."""
    world_size = distributed.world_size()
    if torch.accelerator.is_available():
        memory = (
            torch.cuda.get_device_properties(distributed.device()).total_memory if torch.cuda.is_available() else None
        )
        return gpu_machine(world_size, memory)
    return cpu_machine(world_size, available_memory() / distributed.processes_here() + resident_memory())


def gpu_machine(world_size: int, memory: float | None) -> Machine:
    """GPUs of `memory` bytes each."""
    base = GPU_CONTEXT + (GROUPS * GPU_COMMUNICATION if world_size > 1 else 0)
    return Machine(device_type="cuda", world_size=world_size, base=base, memory=memory)


def cpu_machine(world_size: int, memory: float | None, *, data_is_read: bool = True) -> Machine:
    """CPU processes with `memory` bytes each; the libraries' share is that of this process, which has loaded them."""
    base = resident_memory() + LATER_LIBRARIES + (0 if data_is_read else DATA_LIBRARIES)
    return Machine(device_type="cpu", world_size=world_size, base=base, memory=memory)
