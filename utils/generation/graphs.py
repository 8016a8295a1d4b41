"""Decode steps as CUDA graphs: hundreds of small kernels become one launch."""

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

import torch

from utils.errors import RankError
from utils.parallel.memory import is_out_of_memory


class Graph(Protocol):
    """Recorded work on the device."""

    def replay(self) -> None:
        """Run it again, on the same memory."""


def cuda_recorder() -> Callable[[Callable[[], None]], Graph]:
    """A function that records the GPU work of a step, without running it.

    All its graphs share their scratch memory: they never run at the same time, and a step's results are kept elsewhere.
    That memory is freed with the last graph, and torch refuses to record into it again: then make another recorder.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may pin memory
            step()
        return graph

    return record


class StepGraphs:
    """Graphs of steps, each of which reads and writes memory at fixed addresses.

    A graph holds addresses, not tensors: weights that an optimiser changes in place are read again in every replay,
    while weights that have moved (gathered again by ZeRO-3, say) would be read at their old addresses. `refresh`
    detects this.

    Args:
        recorder: makes a function that records a step, as `cuda_recorder` does.

    Attributes:
        memory: what the steps write to, kept here from one `Scheduler` to the next.
    """

    def __init__(self, recorder: Callable[[], Callable[[Callable[[], None]], Graph]]):
        self._recorder, self._record = recorder, recorder()
        self._graphs: dict[Hashable, Graph] = {}
        self._warm: set[Hashable] = set()
        self._addresses: tuple | None = None
        self.memory = None

    def refresh(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drop all graphs unless every tensor that steps use is where it was; call it before the first `run`."""
        addresses = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        if addresses != self._addresses:
            self._addresses = addresses
            self._drop()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`: directly the first time, which also lets libraries initialise themselves, then as a graph.

        Args:
            key: every value that recording `step` fixes (shapes, constants); everything else must be read from memory.

        Raises:
            RankError: the step cannot be recorded. It is not run directly instead: torch's allocator does not recover
                from a failed recording, and would no longer release cached memory.
        """
        if key not in self._warm:
            self._warm.add(key)
            step()
            return
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(step)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise RankError(
                    "a decode step cannot be recorded as a CUDA graph here: add --no_generation_cuda_graphs. "
                    f"{str(error).splitlines()[0]}"
                ) from error
        self._graphs[key].replay()

    def release(self) -> None:
        """Drop the graphs and the memory that they write to."""
        self._drop()
        self._addresses = self.memory = None

    def _drop(self) -> None:
        if self._graphs:
            self._graphs.clear()
            self._record = self._recorder()
