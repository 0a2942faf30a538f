"""Memory that runs out while a training runs, on a GPU that shares it with its host or on a CPU.

There the kernel has nothing to fall back on: the host of a GB10 hangs, a CPU's kills. So a thread looks at what is
left every second, and asks the training to stop before that: it saves at the end of the pack that is being computed
(a second or two on a DGX Spark). Where half of the floor is gone as well, it stops at once, with what was saved last.
So does what has nothing to save, under the floor already: a model that is loaded, rehearsed, measured.

What torch allocates on a shared GPU is limited besides (`guard.limit_memory`): a failed allocation is an error of its
own. What is watched is all else that takes memory on that host: other processes, the loading of data, the page tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparkctl.hardware.machine import available_memory
from sparkctl.train import guard

if TYPE_CHECKING:
    from sparkctl.manifest.schema import Machine

EVERY = 1.0  # seconds from look to look; one takes half a millisecond
LOADING = 0.1  # the same while a model is loaded: a fast disk fills a floor of 2 GiB in .3 s
SHARE = 0.02  # of the memory that a plan may use: it leaves more than that (3 % on a CPU, 6 GiB on a shared GPU)
UNIFIED = 2 << 30  # bytes, where a GPU shares its host's memory: less is not enough to write a checkpoint safely
AT_ONCE = 0.5  # share of the floor under which nothing is saved any more


def floor(machine: Machine) -> int:
    """Bytes left under which a training saves and stops; 0: not watched, the GPU has memory of its own.

    A Spark with 112 GiB for the plan: 2.2 GiB. A laptop with 8 GiB: 164 MiB.
    """
    if machine.unified_memory:
        return max(UNIFIED, int(SHARE * machine.memory))
    return int(SHARE * machine.memory) if machine.device == "cpu" else 0


@contextmanager
def watched(
    machine: Machine, signals: guard.Signals, read: Callable[[], int] | None = None, every: float | None = None
) -> Iterator[None]:
    """Watch the memory of `machine` for the length of the block, and turn a failed allocation in it into SparkError.

    read: gives the bytes that are left.
    """
    looking = _looking(machine, signals, read, EVERY if every is None else every)
    with looking, guard.memory("the next step", signals.free_hint):
        yield


@contextmanager
def watched_alone(
    machine: Machine, doing: str, read: Callable[[], int] | None = None, every: float | None = None
) -> Iterator[None]:
    """Watch it while something runs that has nothing to save; raises Interrupted where memory runs low meanwhile.

    doing: what that is, as "the model was loaded". Call it in the main thread.
    """
    leaving = guard.Leaving(doing)
    with leaving.caught(), _looking(machine, leaving, read, LOADING if every is None else every):
        yield


@contextmanager
def _looking(
    machine: Machine, told: guard.Signals | guard.Leaving, read: Callable[[], int] | None, every: float
) -> Iterator[None]:
    """A thread that looks, where that machine is watched."""
    lowest, done = floor(machine), threading.Event()
    looks = (told, lowest, done, read or available_memory, every)
    watcher = threading.Thread(target=_watch, args=looks, name="memory", daemon=True)
    if lowest:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if lowest:
            watcher.join()


def _watch(
    told: guard.Signals | guard.Leaving, lowest: int, done: threading.Event, read: Callable[[], int], every: float
) -> None:
    while not done.wait(every):
        left = read()
        if left < lowest:
            short = f"{left / 2**30:.2f} GiB left, the floor is {lowest / 2**30:.2f} GiB"
            told.short_of_memory(short, at_once=left < AT_ONCE * lowest)
