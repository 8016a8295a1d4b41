"""The process group, seeds, rank-0 logging and reductions over ranks.

Every step works with one process or many, launched by `deepspeed`, by `torchrun` or as plain `python main.py`.
On machines without an accelerator this module must be imported before `deepspeed`, which picks its backend at import.
"""

import contextlib
import datetime
import gc
import io
import logging
import os
import random
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import groups

from utils.errors import InputError, RankError
from utils.output.progress import Wait
from utils.parallel import watchdog

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LEAST_DRIVER = {"13": 580, "12": 525}  # oldest driver for a torch built for this CUDA
LEAST_TIMEOUT = datetime.timedelta(minutes=60)
_verbose = False
_timeout = LEAST_TIMEOUT  # of every group's collectives


def init_distributed(verbose: bool = False, stall_timeout: float = 0.0) -> None:
    """Join (or, in a single process, create) the process group: nccl on GPUs, gloo on a CPU. Safe to call again.

    Args:
        stall_timeout: minutes without progress after which the run ends, see `watchdog`; 0: none. Collectives have a
            time limit of their own, whose error says less, and which is therefore longer.
    """
    global _verbose, _timeout
    _verbose = verbose
    if not verbose:
        _silence_libraries()
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(local_rank())
    else:
        # Compiling DeepSpeed's shared-memory collectives takes half a minute and leaks /dev/shm; gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not 0 <= rank() < world_size():
        raise RankError(f"the environment has RANK={rank()} with WORLD_SIZE={world_size()}: ranks count from 0")
    gc.freeze()  # exempts what imports created: DeepSpeed collects garbage often, which takes half a second with it
    _timeout = max(LEAST_TIMEOUT, datetime.timedelta(minutes=2 * stall_timeout))
    try:
        with quiet():
            deepspeed.init_distributed(timeout=_timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            raise
        raise RankError(
            f"port {os.environ.get('MASTER_PORT')} of this machine, at which the processes must connect, is in use: "
            "give the launcher another one, such as --master_port 29511"
        ) from error
    # The group in which ZeRO reduces and gathers. DeepSpeed would create it with torch's default time limit: 10 minutes
    # for nccl, 30 for gloo.
    groups._WORLD_GROUP = new_group(range(world_size()))
    watchdog.start(rank(), world_size(), stall_timeout)


def check_driver() -> None:
    """Refuse a run that would use the CPU although there is an NVIDIA GPU: its driver is too old for this torch.

    CUDA_VISIBLE_DEVICES="" in the environment asks for the CPU.

    Raises:
        InputError: naming the driver and what it needs.
    """
    asks_for_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if torch.cuda.is_available() or asks_for_cpu or not NVIDIA_DRIVER.is_file():
        return
    found = re.search(r"Kernel Module\D*(\d+[.\d]*)", NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace"))
    driver = f"NVIDIA driver {found[1]}" if found else "NVIDIA driver"
    if torch.version.cuda is None:
        warn(
            f"this machine has an {driver}, but torch {torch.__version__} is built for CPUs: the run uses the CPU. "
            "`bash scripts/setup_environment.sh` installs torch with CUDA"
        )
        return
    needed = LEAST_DRIVER.get(torch.version.cuda.split(".")[0])
    raise InputError(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPU of this machine with its {driver}"
        + (f", which must be {needed} or newer" if needed else "")
        + ": update it, or install a build of torch for an older CUDA, such as 12.6, which runs on drivers from 525; "
        'CUDA_VISIBLE_DEVICES="" runs on the CPU'
    )


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of some ranks whose collectives have the same time limit as those of all. Every rank must call it."""
    return dist.new_group(list(ranks), timeout=_timeout)


def quiet() -> contextlib.AbstractContextManager:
    """Context that swallows what DeepSpeed prints on stdout, unless the run is verbose."""
    return contextlib.nullcontext() if _verbose else contextlib.redirect_stdout(io.StringIO())


def _silence_libraries() -> None:
    """Silence everything below an error of DeepSpeed, transformers and torch; not called with `--verbose`."""
    for name in ("DeepSpeed", "deepspeed", "torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers|peft)\b.*")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank() -> int:
    """This process's rank over all machines; known from the environment before the group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's rank on its own machine, which is the index of its device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Processes of the run on this machine, which share its memory."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size()), 1)


def is_main() -> bool:
    """True on the one process that prints and writes files."""
    return rank() == 0


def device() -> torch.device:
    """The device this process computes on."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type, local_rank())
    return torch.device("cpu")


def device_name() -> str:
    """The kind of device this process computes on, as its maker calls it where that is known."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "CPU"


def to_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A collated batch on this process's device."""
    watchdog.alive()
    return {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}


def log(message: str) -> None:
    """Print one line on rank 0."""
    if is_main():
        print(message, flush=True)


def warn(message: str) -> None:
    """Print one line of warning to stderr on rank 0."""
    if is_main():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def wait(what: str, total: int | None = None) -> Wait:
    """A progress bar on rank 0 for work that may take long; see `output.progress.Wait`."""
    return Wait(what, total, is_main=is_main())


def barrier() -> None:
    if world_size() > 1:
        watchdog.alive()
        dist.barrier()


def seed_everything(seed: int) -> None:
    """Seed python, numpy (through transformers' helper) and torch on every device with the same number on every rank.

    Whatever must differ (sampling, data order, the ranks' random numbers) uses separate seeds: see `derived_seed`.
    """
    import transformers

    random.seed(seed)
    transformers.set_seed(seed)


def derived_seed(*numbers: int) -> int:
    """A seed for these numbers in this order, such as (seed, epoch), in [0, 2^63); the same on every machine.

    With a sum, epoch 1 of seed 1 would equal epoch 0 of seed 2.
    """
    return hash(numbers) % 2**63  # the hash of a tuple of integers is the same in every Python process


def all_reduce(values: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum (or "max", "min") of `values` over all ranks."""
    if world_size() == 1:
        return values
    watchdog.alive()
    reduced = values.to(device(), copy=True)
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(reduced, op=operations[op])
    return reduced.to(values.device)


def all_reduce_scalar(value: float, op: str = "sum") -> float:
    """`all_reduce` for one python number."""
    return all_reduce(torch.tensor(float(value), dtype=torch.float64), op).item()


def all_reduce_dict(values: dict[str, float], op: str = "sum") -> dict[str, float]:
    """`all_reduce` for a dictionary whose keys agree on every rank, in one collective."""
    reduced = all_reduce(torch.tensor([float(value) for value in values.values()], dtype=torch.float64), op)
    return dict(zip(values, reduced.tolist(), strict=True))


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks: (world_size * n, ...) from (n, ...), n the same on every rank."""
    if world_size() == 1:
        return values
    own = values.new_zeros(world_size(), *values.shape)
    own[rank()] = values
    return all_reduce(own).flatten(0, 1)


def first_problem(problem: str | None) -> str | None:
    """The problem of the lowest rank that has one, on every rank; None if no rank has. Truncated to 1,000 bytes."""
    if world_size() == 1:
        return problem
    source = int(all_reduce_scalar(rank() if problem else world_size(), "min"))
    if source == world_size():
        return None
    text = (problem or "").encode()[:1000] if rank() == source else b""
    shared = all_reduce(torch.frombuffer(bytearray(text.ljust(1000, b"\0")), dtype=torch.uint8))
    return bytes(shared.tolist()).rstrip(b"\0").decode(errors="ignore")
