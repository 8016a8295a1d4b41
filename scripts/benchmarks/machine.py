"""The machine that a benchmark runs on: its description for the report, a stopwatch, and its peak rates."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROUNDS = 5  # of which the fastest counts
RESET_PEAK = Path("/proc/self/clear_refs")  # "5" written to it resets the peak to the memory in use now


def describe() -> str:
    """Processor, cores, memory and GPU in one line."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} ({capability}), {cores} cores, {memory:.0f} GiB, {gpu}"


def timed(function: Callable[[], object]) -> float:
    """Seconds that `function` takes, the device's work included."""
    _synchronize()
    started = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], object]) -> float:
    """Peak MiB that `function` takes beyond what is in use before; on a CPU resident memory, as Linux reports it.

    NaN where the system does not report it.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not RESET_PEAK.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that was not returned would not be counted when used again
    RESET_PEAK.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def bandwidth(device: torch.device) -> float:
    """Peak memory bandwidth in bytes per second: the faster of a sum and a copy of 1 GiB (CPU: 256 MiB)."""
    elements = 2**28 if device.type != "cpu" else 2**26
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    work = {source.sum: source.nbytes, lambda: target.copy_(source): 2 * source.nbytes}
    return max(size / min(timed(function) for _ in range(ROUNDS)) for function, size in work.items())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product in `dtype`."""
    size = 8192 if device.type != "cpu" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(ROUNDS))


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _status(name: str) -> int:
    """A size in KiB from this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
