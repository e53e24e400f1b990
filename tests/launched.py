"""Processes of one launch on this machine, as `torchrun` starts them, but forked: they have the imports and the model."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def launch(work: Callable[..., None], *args: Any, n: int = 2, seconds: float = 300) -> list[int | None]:
    """Run `work(*args, index)` in each of n processes that know of each other; returns their exit codes.

    As soon as one fails, or after so many seconds, the others are ended, as a launcher does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_one, args=(work, args, i, n, port)) for i in range(n)]
    for worker in workers:
        worker.start()
    waiting = {worker.sentinel: worker for worker in workers}
    while waiting:
        ended = multiprocessing.connection.wait(list(waiting), timeout=seconds)
        failed = [worker for worker in map(waiting.pop, ended) if not _succeeded(worker)]
        if failed or not ended:
            break
    for worker in waiting.values():
        worker.kill()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _succeeded(worker: Any) -> bool:
    worker.join()
    return worker.exitcode == 0


def _one(work: Callable[..., None], args: tuple[Any, ...], index: int, n: int, port: int) -> None:
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(*args, index)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
