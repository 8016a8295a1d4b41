"""Memory of this process and its machine: what is free, what fits, and the error when it runs out."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from utils.errors import RankError
from utils.parallel import distributed
from utils.parallel.zero import is_partitioned

# In messages of torch's device and host allocators, of the driver, and of libraries that allocate memory themselves.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
USABLE = 0.9  # share of the free memory: the rest is for activations and fragmentation
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that this process may still take on its device; on a CPU, its share of what the machine has left."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return available_memory() / distributed.processes_here()


def available_memory() -> float:
    """Bytes that new allocations may take on this machine and in its control groups; infinite where unknown."""
    available = float("inf")
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = float(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *map(room_in, control_groups())])


def control_groups() -> list[Path]:
    """Folders of the control groups (version 2) that this process is in, innermost first; none where there are none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::/"):
                group = CONTROL_GROUPS / line.removeprefix("0::/")
                return [group, *(parent for parent in group.parents if parent.is_relative_to(CONTROL_GROUPS))]
    return []


def room_in(group: Path) -> float:
    """Bytes that a control group may still use below its limit; cached files, which can be dropped, count as free."""
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    cached = sum(float(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return float("inf") if limit == "max" else float(limit) - float(used) + cached


def resident_memory() -> float:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of `model` when they are whole, in their current number format."""
    return sum(
        (parameter.ds_numel if is_partitioned(parameter) else parameter.numel()) * parameter.element_size()
        for parameter in model.parameters()
    )


def is_room_for(needed: float, free: float) -> bool:
    """Whether `needed` bytes may be allocated when `free` are free: the rule of generation and of its estimate."""
    return needed <= USABLE * free


def fits(needed: float) -> bool:
    """Whether every rank has room for `needed` bytes; a collective, with the same answer on all ranks."""
    return bool(distributed.all_reduce_scalar(float(is_room_for(needed, free_memory())), "min"))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one during whose handling it was raised, means that memory has run out.

    `torch.OutOfMemoryError` is only what torch's own allocator raises.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a `RankError` with `advice`: the flags that reduce memory use."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise RankError(f"out of memory in generation: {advice}. {str(error).splitlines()[0]}") from error
