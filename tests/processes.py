"""Run a test's function in real processes that form a group, and get back what each rank returned."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 240  # seconds


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call the module-level `function(*arguments)` on `world_size` ranks joined through gloo; results in rank order.

    A rank that raises fails the test with that rank's traceback; ranks that hang fail it after `TIMEOUT` seconds.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(results, rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            rank, value, failure = results.get(timeout=TIMEOUT)
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            answers[rank] = value
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def _run_rank(results, rank: int, world_size: int, port: int, function, arguments) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
    )
    try:
        import torch

        from utils.parallel import distributed

        distributed.init_distributed()
        value = function(*arguments)
        distributed.barrier()
        torch.distributed.destroy_process_group()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
