"""A run of several processes that stalls ends with a line that names the process holding up the others.

Every process reports its position at points that all of them pass in the same order (`alive`). A thread publishes it
through a separate connection to the process group's store. When no process has made progress for the given time, the
thread of each one reads which processes have passed the fewest points, and ends its own.
"""

import atexit
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

EXIT_CODE = 5
POLLS = 20  # per time limit, and at least one per second
_REPOSITORY = Path(__file__).resolve().parents[2]
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_STORE_TIMEOUT = timedelta(seconds=30)


@dataclasses.dataclass
class Report:
    """The position of a process.

    Attributes:
        points: number of its calls of `alive`. what: what it is doing, according to the last call that named it.
        since: the time of its last report of progress, in seconds since 1970.
        place: the line of this repository that it executes. waits: whether that line waits for other processes.
    """

    points: int = 0
    what: str = "the start"
    since: float = 0.0
    place: str = ""
    waits: bool = False


_own = Report()
_started = False
_ends = threading.Event()


def alive(what: str = "") -> None:
    """Report progress: this process now does `what` (empty: as before). All ranks must call it at the same points."""
    _own.what = what or _own.what
    _own.since = time.time()
    _own.points += 1


def working() -> None:
    """Report progress of work that this process does alone and that others may wait for."""
    _own.since = time.time()


def start(rank: int, world_size: int, minutes: float) -> None:
    """Watch this process from now on. Does nothing in a run of one process, with 0 minutes, or when already started.

    Ends the process with `EXIT_CODE` when no process has reported progress for `minutes`.
    """
    global _started
    if world_size == 1 or not minutes or _started:
        return
    _started = True
    alive()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT
    )
    arguments = (store, rank, world_size, minutes * 60, threading.get_ident())
    thread = threading.Thread(target=_watch, args=arguments, daemon=True, name="watchdog")
    thread.start()
    atexit.register(_end, thread)


def _end(thread: threading.Thread) -> None:
    """Let the thread finish: if it used the store while the interpreter shuts down, it would abort the process."""
    _ends.set()
    thread.join(_STORE_TIMEOUT.total_seconds())


def _watch(store: dist.Store, rank: int, world_size: int, limit: float, watched: int) -> None:
    interval = min(1.0, limit / POLLS)
    while not _ends.wait(interval):
        idle = time.time() - _own.since
        if idle > limit / 2:
            _own.place, _own.waits = _position(watched)
        try:
            store.set(f"watchdog/{rank}", json.dumps(dataclasses.asdict(_own)))
            if idle < limit:
                continue
            reports = _read(store, world_size)
            still = time.time() - max(report.since for report in reports.values())
            if still < limit:
                continue
            if store.add("watchdog/told", 1) == 1:
                os.write(2, (stall_message(reports, world_size, still) + "\n").encode())
            # All exit together: one still in a collective when another has exited would report that as its error.
            store.set(f"watchdog/{rank}/leaves", "")
            leaving = [f"watchdog/{other}/leaves" for other in range(world_size)]
            store.wait(leaving, timedelta(seconds=5 * interval))
        except (RuntimeError, OSError):  # the process that hosts the store has exited, or one did not announce its exit
            if idle < limit / 2:
                return  # the usual end of a run
        os._exit(EXIT_CODE)


def stall_message(reports: dict[int, Report], world_size: int, seconds: float) -> str:
    """One line that names the processes holding up the others.

    These are the ones that passed the fewest points; of them only those that do not wait for others, if there are any.

    Args:
        reports: by rank; a rank without one has never reported. seconds: since any process made progress.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    fewest = min(report.points for report in reports.values())
    last = [rank for rank, report in reports.items() if report.points == fewest]
    behind = silent or [rank for rank in last if not reports[rank].waits] or last
    others = [rank for rank in range(world_size) if rank not in behind]
    parts = [_describe(behind, reports)]
    if others:
        parts.append(f"while {_describe(others, reports)}")
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    return f"error: no progress for {minutes}: {', '.join(parts)} (--stall_timeout)"


def _describe(ranks: list[int], reports: dict[int, Report]) -> str:
    """The first of `ranks` and its position, and how many more there are."""
    report = reports.get(ranks[0])
    more = f" (and {len(ranks) - 1} more, up to rank {ranks[-1]})" if len(ranks) > 1 else ""
    if report is None:
        return f"rank {ranks[0]}{more} has reported nothing"
    verb = "waits for others" if report.waits else "is"
    return f"rank {ranks[0]}{more} {verb} at {report.what}" + (f", {report.place}" if report.place else "")


def _read(store: dist.Store, world_size: int) -> dict[int, Report]:
    reports = {}
    for rank in range(world_size):
        if store.check([f"watchdog/{rank}"]):
            reports[rank] = Report(**json.loads(store.get(f"watchdog/{rank}")))
    return reports


def _position(thread: int) -> tuple[str, bool]:
    """The innermost line of this repository that a thread executes, and whether it waits in a collective."""
    place, waits = "", False
    for frame in traceback.extract_stack(sys._current_frames()[thread]):
        file = Path(frame.filename)
        if file.is_relative_to(_REPOSITORY) and "site-packages" not in file.parts:
            place, waits = f"{file.relative_to(_REPOSITORY)} line {frame.lineno} in {frame.name}", False
        elif any(package in file.as_posix() for package in _COLLECTIVES) or frame.name in ("wait", "synchronize"):
            waits = True
    return place, waits
