"""A run that stands still ends, and its last line names the process that the others wait for."""

import os
import subprocess
import sys
import time

import pytest
from processes import TIMEOUT
from step_scripts import REPOSITORY

from utils.arguments.base import known_flag
from utils.arguments.output import CheckpointArguments
from utils.parallel.watchdog import EXIT_CODE, Report, stall_message

PROGRAM = """
import datetime, sys, time, torch
import deepspeed
from utils.parallel import distributed, watchdog

kind = sys.argv[1]
# Groups that are not given the run's limit get this one instead of half an hour: shorter than any wait here.
torch.distributed.distributed_c10d._get_default_timeout = lambda backend: datetime.timedelta(seconds=2)
distributed.init_distributed(stall_timeout=4 / 60)

def reduce():
    # As ZeRO does it, in the group where it does.
    deepspeed.comm.all_reduce(torch.ones(1), group=deepspeed.utils.groups._get_data_parallel_group())

def stall():
    if kind != "slow" and distributed.rank() == 1:
        time.sleep(10_000)

for step in (1, 2):
    watchdog.alive(f"step {step}, forward pass")
    if step == 2 and kind == "between points":
        stall()
    watchdog.alive(f"step {step}, backward pass")
    if step == 2 and kind == "inside a collective's step":
        stall()
    reduce()
if kind == "slow" and distributed.rank() == 1:
    for _ in range(10):
        time.sleep(0.7)
        watchdog.alive()  # the others wait for it, and rightly so
reduce()
distributed.barrier()
torch.distributed.destroy_process_group()
"""


ENDS = """
import time
import torch.distributed as dist
from utils.parallel import distributed, watchdog

class BusyStore(dist.TCPStore):
    def set(self, key, value):
        for _ in range(200):
            super().set(key, value)

class SlowToGo:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

last = SlowToGo()
dist.TCPStore, watchdog.POLLS = BusyStore, 60_000
distributed.init_distributed(stall_timeout=1)
distributed.barrier()
rank, store = distributed.rank(), dist.distributed_c10d._get_default_store()
dist.destroy_process_group()
time.sleep(2 * (rank == 0))  # its store answers until the other has gone
"""


def launch(kind: str, program: str = PROGRAM) -> list[tuple[int, str]]:
    """Exit codes and stderr of two processes, without a launcher that would end the second after the first."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "29641", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, kind],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in (0, 1)
    ]
    try:
        return [(rank.communicate(timeout=TIMEOUT), rank.returncode)[::-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(("kind", "where"), [("between points", "forward"), ("inside a collective's step", "backward")])
def test_a_process_that_sleeps_is_named(kind, where):
    results = launch(kind)
    assert [code for code, _ in results] == [EXIT_CODE, EXIT_CODE], results
    (line,) = [line for _, (_, errors) in results for line in errors.splitlines() if "no progress for" in line]
    assert f"rank 1 is at step 2, {where} pass" in line
    assert "while rank 0 waits for others at step 2, backward pass" in line


def test_the_flag_says_the_exit_code():
    assert f"ends with exit code {EXIT_CODE} and names" in known_flag(CheckpointArguments, "stall_timeout").help


def test_waiting_for_a_slow_process_is_no_stall():
    started = time.monotonic()
    assert [code for code, _ in launch("slow")] == [0, 0]
    assert time.monotonic() - started > 7


def test_a_run_that_ends_while_the_watchdog_speaks_ends_well():
    """A thread that is inside the store when the interpreter exits would abort the process."""
    assert [code for code, _ in launch("", ENDS)] == [0, 0]


def report(points: int, what: str, waits: bool = False) -> Report:
    return Report(points, what, since=1.0, place=f"file.py line {points}", waits=waits)


def test_the_message_names_who_is_behind():
    waiting = report(9, "step 3", waits=True)
    message = stall_message({0: waiting, 1: report(7, "step 2"), 2: waiting}, 3, 3600.0)
    assert message == (
        "error: no progress for 60 minutes: rank 1 is at step 2, file.py line 7, while rank 0 (and 1 more, up to "
        "rank 2) waits for others at step 3, file.py line 9 (--stall_timeout)"
    )
    level = stall_message({0: waiting, 1: report(9, "step 3"), 2: waiting}, 3, 60.0)
    assert "rank 1 is at step 3" in level and "while rank 0" in level  # all at the same step, but one is not waiting
    assert "rank 0 (and 2 more, up to rank 2) waits" in stall_message({0: waiting, 1: waiting, 2: waiting}, 3, 60.0)
    assert "60 seconds: rank 2 has reported nothing, while rank 0" in stall_message({0: waiting, 1: waiting}, 3, 60.0)
