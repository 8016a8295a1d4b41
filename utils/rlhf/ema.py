"""An exponential moving average of the actor's trainable weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from utils.parallel import distributed
from utils.parallel.zero import is_partitioned, partition_again


class ExponentialMovingAverage:
    """shadow <- decay * shadow + (1 - decay) * weight, in fp32, started from the weights themselves.

    Under ZeRO-3 each rank averages the part it owns. Otherwise all ranks hold the same weights, and rank 0 alone
    averages them. With LoRA the factors are averaged (the frozen base is its own average).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.averaged = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averaged = [p for p in self.averaged if is_partitioned(p) or distributed.is_main()]
        self.shadow = [_local(parameter).detach().float().clone() for parameter in self.averaged]

    @torch.no_grad()
    def update(self) -> None:
        for shadow, parameter in zip(self.shadow, self.averaged, strict=True):
            shadow.lerp_(_local(parameter).float(), 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own, bit for bit, afterwards."""
        saved = [_local(parameter).detach().clone() for parameter in self.averaged]
        try:
            self._write(self.shadow)
            yield
        finally:
            self._write(saved)

    @torch.no_grad()
    def _write(self, tensors: list[torch.Tensor]) -> None:
        for tensor, parameter in zip(tensors, self.averaged, strict=True):
            _local(parameter).copy_(tensor)
        partition_again(self.averaged)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """The memory of a parameter that this rank owns."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter.data
