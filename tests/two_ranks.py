"""Two ranks on this machine."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from forking import mend_threads


def free_port() -> int:
    """A port of this machine on which nobody listens, of those that the system gives to no connection by itself: it is
    free until the ranks meet there."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)  # tests seed the usual one
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two processes with the environment that torchrun gives.

    They are forked: a fresh import of torch in each would take seconds.
    """
    forked = (free_port(), function, arguments)
    torch.multiprocessing.start_processes(_as_rank, args=forked, nprocs=2, start_method="fork")


def _as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    mend_threads()
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**here, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    function(rank, *arguments)
