"""Memory that runs out while a training runs, on a GPU that shares it with its host or on a CPU.

There the kernel has nothing to fall back on: the host of a GB10 hangs, a CPU's kills. So a thread looks at what is
left every second, and asks the training to stop before that: it saves at the end of the pack that is being computed
(a second or two on a DGX Spark). Where half of the floor is gone as well, it stops at once, with what was saved last.

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
    lowest, done = floor(machine), threading.Event()
    looks = (signals, lowest, done, read or available_memory, EVERY if every is None else every)
    watcher = threading.Thread(target=_watch, args=looks, name="memory", daemon=True)
    if lowest:
        watcher.start()
    try:
        with guard.memory("the next step", signals.free_hint):
            yield
    finally:
        done.set()
        if lowest:
            watcher.join()


def _watch(signals: guard.Signals, lowest: int, done: threading.Event, read: Callable[[], int], every: float) -> None:
    while not done.wait(every):
        left = read()
        if left < lowest:
            told = f"{left / 2**30:.2f} GiB left, the floor is {lowest / 2**30:.2f} GiB"
            signals.short_of_memory(told, at_once=left < AT_ONCE * lowest)
