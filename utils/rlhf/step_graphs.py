"""Decode steps as CUDA graphs: hundreds of small kernels become one launch."""

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

import torch


class Graph(Protocol):
    """Recorded work on the device."""

    def replay(self) -> None:
        """Do it again, on the same memory."""


def cuda_recorder() -> Callable[[Callable[[], None]], Graph]:
    """A function that records what a step does on the GPU, without doing it.

    All its graphs share their scratch memory: they never run at the same time, and what a step leaves is elsewhere.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may pin memory
            step()
        return graph

    return record


class StepGraphs:
    """Graphs of steps, each of which reads and writes memory that stays where it is.

    A graph knows addresses, not tensors: weights that an optimiser changes in place are read anew in every replay,
    while weights that have moved (gathered again by ZeRO-3, say) would be read where they were. `refresh` finds out.

    Attributes:
        memory: what the steps write to, kept here from one call of `decode` to the next.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Graph]):
        self._record = record
        self._graphs: dict[Hashable, Graph] = {}
        self._warm: set[Hashable] = set()
        self._addresses: tuple | None = None
        self.memory = None

    def refresh(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drop all graphs unless every tensor that steps touch is where it was; to be called before the first `run`."""
        addresses = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        if addresses != self._addresses:
            self._addresses = addresses
            self._graphs.clear()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do `step`: as it is the first time, which also lets libraries set themselves up, and from then on as a graph.

        Args:
            key: every number that `step` bakes into its work (shapes, constants); everything else must be in memory.
        """
        if key not in self._warm:
            self._warm.add(key)
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = self._record(step)
        self._graphs[key].replay()

    def release(self) -> None:
        """Drop the graphs and the memory that they write to."""
        self._graphs.clear()
        self._addresses = self.memory = None
