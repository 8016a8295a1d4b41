"""A run's phases and their largest moments: what is alive at each, and what the allocator holds besides."""

from dataclasses import dataclass

from utils.preflight.blocks import Blocks

Items = dict[str, Blocks]
KEPT_HEAP = "freed, kept by the allocator"
HEAP_WASTE = 0.5  # measured: what a CPU's heap holds beyond its peak use, as a share of what is allocated and freed
GPU_SLACK = 0.08  # assumed, not measured: share that the caching allocator holds beyond what is in use


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one process has. `base` and `memory` in bytes; `memory` None where it is not known."""

    device_type: str  # "cpu" or "cuda"
    world_size: int
    base: float
    memory: float | None

    @property
    def on_gpu(self) -> bool:
        return self.device_type != "cpu"


@dataclass(frozen=True)
class Phase:
    """The largest moment of a phase, in bytes by item."""

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class Gathering:
    """What `--stream_generation_weights auto` is expected to do at ZeRO-3, and the bytes by which it decides."""

    streams: bool
    needed: float
    free: float | None  # None where the machine's memory is not known


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes to `--output_dir`: one checkpoint, 0 without them, and all models."""

    checkpoint: float = 0.0
    models: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """All phases of a step on one process; `host` has the bytes in a GPU's host memory, by what puts them there."""

    phases: list[Phase]
    tokens_per_step: int  # of all processes, at most
    host: dict[str, float]
    disk: Disk
    gathering: Gathering | None = None

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases)


@dataclass(frozen=True)
class Moment:
    """What is alive at a moment of a phase."""

    phase: str
    items: Items


def joined(one: Items, other: Items) -> Items:
    """The items of both; those of the same name are added up."""
    return {name: one.get(name, Blocks()) + other.get(name, Blocks()) for name in (one | other)}


def total_of(items: Items) -> Blocks:
    """All items together."""
    return sum(items.values(), Blocks())


def largest_moments(moments: list[Moment], machine: Machine) -> list[Phase]:
    """The largest moment of each phase, with the base of the process and what the allocator keeps."""
    reckon = _on_gpu if machine.on_gpu else _on_cpu
    phases: dict[str, Phase] = {}
    for moment, items in zip(moments, reckon(moments), strict=True):
        phase = Phase(moment.phase, {"base of the process": machine.base} | items)
        if moment.phase not in phases or phase.total > phases[moment.phase].total:
            phases[moment.phase] = phase
    return list(phases.values())


def _on_gpu(moments: list[Moment]) -> list[dict[str, float]]:
    listed = []
    for moment in moments:
        items = {name: blocks.total for name, blocks in moment.items.items()}
        listed.append(items | {KEPT_HEAP: GPU_SLACK * sum(items.values())})
    return listed


def _on_cpu(moments: list[Moment]) -> list[dict[str, float]]:
    """The heap keeps its peak size; the loop comes back to every phase but loading, which comes once, first.

    It grows beyond the peak use: the aligned blocks that torch requests do not fit holes of their own size.
    """
    sizes = [total_of(moment.items).small for moment in moments if moment.phase != "loading"]
    greatest = max(sizes) + HEAP_WASTE * (max(sizes) - min(sizes))
    listed = []
    for moment in moments:
        items = {name: blocks.total for name, blocks in moment.items.items()}
        kept = 0.0 if moment.phase == "loading" else greatest - total_of(moment.items).small
        listed.append(items | {KEPT_HEAP: kept})
    return listed
