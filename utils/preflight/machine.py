"""What a process has: the device's memory, and what it takes before any model is there."""

import contextlib
import os
from pathlib import Path

import torch

from utils import distributed
from utils.preflight.phases import Machine

MIB = 2**20
CONTROL_GROUPS = Path("/sys/fs/cgroup")
LATER_LIBRARIES = 45 * MIB  # measured on a CPU: what torch, DeepSpeed and transformers load when training starts
DATA_LIBRARIES = 52 * MIB  # measured: what reading the data adds, for an estimate that does not read them
GPU_CONTEXT = 600 * MIB  # assumed, not measured: CUDA context, cuBLAS workspaces
GPU_COMMUNICATION = 500 * MIB  # assumed, not measured: NCCL's channels, with more than one process


def this_machine() -> Machine:
    """The machine that this process runs on, as one of the processes that share it."""
    world_size = distributed.world_size()
    if torch.accelerator.is_available():
        memory = (
            torch.cuda.get_device_properties(distributed.device()).total_memory if torch.cuda.is_available() else None
        )
        return gpu_machine(world_size, memory)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return cpu_machine(world_size, available_memory() / local + resident_memory())


def gpu_machine(world_size: int, memory: float | None) -> Machine:
    """GPUs of `memory` bytes each."""
    base = GPU_CONTEXT + (GPU_COMMUNICATION if world_size > 1 else 0)
    return Machine(device_type="cuda", world_size=world_size, base=base, memory=memory)


def cpu_machine(world_size: int, memory: float | None, *, data_is_read: bool = True) -> Machine:
    """CPU processes with `memory` bytes each; the libraries' share is read off this process, which has loaded them."""
    base = resident_memory() + LATER_LIBRARIES + (0 if data_is_read else DATA_LIBRARIES)
    return Machine(device_type="cpu", world_size=world_size, base=base, memory=memory)


def resident_memory() -> float:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def available_memory() -> float:
    """Bytes that new allocations could take on this machine, or may in its control groups; infinite where not told."""
    available = float("inf")
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = float(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *map(room_in, control_groups())])


def control_groups() -> list[Path]:
    """Folders of the control groups (version 2) that this process is in, each within the next; none without them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::/"):
                group = CONTROL_GROUPS / line.removeprefix("0::/")
                return [group, *(parent for parent in group.parents if parent.is_relative_to(CONTROL_GROUPS))]
    return []


def room_in(group: Path) -> float:
    """Bytes between what a control group uses, less the files it caches and may forget, and its limit."""
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    cached = sum(float(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return float("inf") if limit == "max" else float(limit) - float(used) + cached
