"""Memory of generation: whether the whole model fits, and where the optimiser's state waits meanwhile."""

import contextlib
import os
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import nn

from utils import distributed
from utils.errors import RankError
from utils.zero import is_partitioned

# Of torch's allocators on a device and a host, of the driver, and of libraries with memory of their own.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
USABLE = 0.9  # of the free memory: the rest is for activations and fragments


def free_memory() -> int:
    """Bytes that this process may still take on its device; on a CPU, its share of what the machine has left."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    neighbours = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size()
    return int(get_accelerator().available_memory()) // max(int(neighbours), 1)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of `model` when they are whole, in the number format that they have now."""
    return sum(
        (parameter.ds_numel if is_partitioned(parameter) else parameter.numel()) * parameter.element_size()
        for parameter in model.parameters()
    )


def fits(needed: int) -> bool:
    """Whether `needed` bytes are there on every rank; all ranks get the same answer and must call it."""
    return bool(distributed.all_reduce_scalar(float(needed <= USABLE * free_memory()), "min"))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory has run out: in this error, or in the one during whose handling it came up.

    `torch.OutOfMemoryError` is only what torch's own allocator raises.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def naming_flags(advice: str) -> Iterator[None]:
    """Out of memory inside becomes a `RankError` with the flags that lower what generation takes."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise RankError(f"out of memory in generation: {advice}. {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def optimizer_on_host(engine: deepspeed.DeepSpeedEngine, *, pin_memory: bool = True) -> Iterator[None]:
    """Adam's moments and the fp32 master weights of `engine` are in host memory inside, and bit-identical after.

    ZeRO 1 and 2 let DeepSpeed move them, which knows what else points at its partitions. At stage 3 it does so for its
    own FusedAdam only, so there, as at stage 0, every tensor of the optimiser is moved that is not a model parameter.
    """
    if engine.zero_optimization_stage() in (1, 2):
        states = {OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params}
        with distributed.quiet():
            engine.offload_states(include=states, pin_memory=pin_memory)
        try:
            yield
        finally:
            with distributed.quiet():
                engine.reload_states()
        return
    tensors = list(_optimizer_tensors(engine))
    devices = [tensor.device for tensor in tensors]
    for tensor in tensors:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin_memory)
        tensor.data = host.copy_(tensor.data)
    try:
        yield
    finally:
        for tensor, device in zip(tensors, devices, strict=True):
            tensor.data = tensor.data.to(device)


def _optimizer_tensors(engine: deepspeed.DeepSpeedEngine) -> Iterator[torch.Tensor]:
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = {id(parameter) for parameter in engine.module.parameters()}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in weights:  # a flat partition of fp32 master weights
            yield parameter
        yield from (tensor for tensor in state.values() if torch.is_tensor(tensor) and tensor.ndim)
