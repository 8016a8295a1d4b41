"""The preflight's report as text: a table of memory, counts, and what to change."""

from utils.output.tables import format_table
from utils.preflight.advice import Advice
from utils.preflight.phases import KEPT_HEAP, Disk, Estimate, Gathering, Machine

GIB = 2**30
ORDER = (  # of the table's rows
    *("base of the process", "parameters", "flat copy", "gradients", "fp32 master weights", "optimiser states"),
    *("activations", "logits", "KV cache", "decode graphs", "generation copies", "gather buffers", "moving average"),
    *("reference model", "reward model", "critic", "copy to save", "weights put aside"),
    *("check for NaN", KEPT_HEAP),
)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def memory_table(estimate: Estimate, machine: Machine) -> str:
    """Items by phase in GiB per process; each column is the phase's peak."""
    present = {name for phase in estimate.phases for name, size in phase.items.items() if size >= GIB / 200}
    names = [name for name in ORDER if name in present]
    rows = [(name, *(gib(phase.items.get(name, 0.0)) for phase in estimate.phases)) for name in names]
    rows.append(("total", *(gib(phase.total) for phase in estimate.phases)))
    unit = "GPU" if machine.on_gpu else "process"
    title = f"predicted memory of each of {machine.world_size} processes, GiB per {unit}, at each phase's peak"
    return format_table(title, rows, ["", *(phase.name for phase in estimate.phases)])


def gathering_line(gathering: Gathering) -> str:
    """How the actor's weights are expected to be gathered for a rollout, and why."""
    how = "its layers one at a time for every token, which is slow" if gathering.streams else "all of its weights once"
    free = "" if gathering.free is None else f", where {gib(max(gathering.free, 0))} GiB are free"
    return (
        f"--stream_generation_weights auto: for a rollout the actor is expected to gather {how} (all at once would "
        f"take up to {gib(gathering.needed)} GiB{free})"
    )


def host_line(host: dict[str, float]) -> str:
    """What is kept in the host memory of a machine with GPUs; empty where it is negligible."""
    parts = [f"{name} {gib(size)}" for name, size in host.items() if size >= GIB / 200]
    return f"in host memory, GiB per process: {', '.join(parts)}" if parts else ""


def disk_line(disk: Disk, checkpoints: int | None) -> str:
    """The space that a run takes at `--output_dir`, with `checkpoints` at a time, None where that is not known."""
    models = f"models {gib(disk.models)}"
    if checkpoints is None:
        return f"on the disk at --output_dir, GiB: {models}, and {gib(disk.checkpoint)} for each checkpoint, all kept"
    if not checkpoints:
        return f"on the disk at --output_dir, GiB: {models}"
    return (
        f"on the disk at --output_dir, GiB: {gib(disk_bytes(disk, checkpoints))} in total; {models}, {checkpoints} "
        f"checkpoints of {gib(disk.checkpoint)} at a time"
    )


def disk_bytes(disk: Disk, checkpoints: int | None) -> float:
    """Bytes at `--output_dir`; with one checkpoint where their number is not known."""
    return disk.models + disk.checkpoint * (1 if checkpoints is None else checkpoints)


def fits_machine(estimate: Estimate, machine: Machine) -> bool:
    return machine.memory is None or estimate.peak <= machine.memory


def verdict(estimate: Estimate, machine: Machine) -> str:
    """One line: the peak, its phase, and whether it fits."""
    largest = max(estimate.phases, key=lambda phase: phase.total)
    line = f"predicted peak: {gib(estimate.peak)} GiB per process, in {largest.name}"
    if machine.memory is None:
        return line
    answer = "fits" if fits_machine(estimate, machine) else "does not fit"
    return f"{line}; {answer} in the {gib(machine.memory)} GiB that each process has"


def advice_table(advice: list[Advice], machine: Machine) -> str:
    """What to change, the predicted peak after each change, and what it costs."""
    rows = [(a.flags, gib(a.after.peak), "yes" if fits_machine(a.after, machine) else "no", a.price) for a in advice]
    return format_table("what to change", rows, ["flags", "peak with them, GiB", "fits", "cost"])
