"""What stops a training before harm is done: a loss that is no number, a signal, memory that runs out."""

from __future__ import annotations

import _thread
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sparkctl.errors import Interrupted, SparkError, memory_ended
from sparkctl.hardware.machine import HOST_RESERVE, available_memory

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.manifest.schema import Machine

SHOWN = 12  # documents named in a message


class Numbers:
    """Checks losses and gradient norms before the optimiser takes them. `place` says where a document was read."""

    def __init__(self, place: Callable[[int], str], hint: str) -> None:
        self._place, self._hint = place, hint

    def check(self, step: int, packs: Sequence[Pack], sums: Sequence[float]) -> None:
        """Raise SparkError naming the first pack of optimiser step `step` whose loss is NaN or infinite."""
        for pack, loss in zip(packs, sums, strict=True):
            if not math.isfinite(loss):
                raise SparkError(f"the loss of step {step} is {loss} in the pack of {self._name([pack])}", self._hint)

    def check_held_out(self, what: str, packs: Sequence[Pack], sums: Sequence[float]) -> None:
        """Raise SparkError naming the first held-out pack whose loss is NaN or infinite."""
        for pack, loss in zip(packs, sums, strict=True):
            if not math.isfinite(loss):
                raise self.no_number(f"{what}, in one pack,", loss, [pack])

    def check_step(self, step: int, packs: Sequence[Pack], loss: float, norm: float) -> None:
        """Raise SparkError naming the step's documents where the whole step's loss or gradient norm is no number."""
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self.no_number(f"the {what} of step {step}", value, packs)

    def no_number(self, what: str, value: float, packs: Sequence[Pack]) -> SparkError:
        """The error that names the packs' documents."""
        return SparkError(f"{what} is {value}, with {self._name(packs)}", self._hint)

    def _name(self, packs: Sequence[Pack]) -> str:
        ids = [document.id for pack in packs for document in pack.documents]
        named = ", ".join(f"{id} ({self._place(id)})" for id in ids[:SHOWN])
        return f"documents {named}" + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


class Signals:
    """What asks a training to stop: SIGINT, SIGTERM, memory that runs low (`train/watch.py` looks at it).

    The first is noted for the loop to act on; a second signal, or hardly any memory left, stops at once. The handlers
    from before come back at the block's end. `say` tells the user; `hint` is how to go on.
    """

    def __init__(self, hint: str, say: Callable[[str], None]) -> None:
        self.received: int | None = None
        self.shortage: str | None = None  # what was left of the memory, in words
        self._hint, self._say = hint, say
        self._exhausted = False

    @property
    def asked(self) -> bool:
        """Whether this process is to stop."""
        return self.received is not None or self.shortage is not None

    @property
    def free_hint(self) -> str:
        """How to go on where memory was short."""
        return f"free some memory (`ps -eo rss,args --sort=-rss | head` shows who holds it), then `{self._hint}`"

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch the signals inside the block. Call it in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def flags(self) -> list[float]:
        """What the ranks add up: a signal here, a shortage here."""
        return [float(self.received is not None), float(self.shortage is not None)]

    def agreed(self, flags: Sequence[float]) -> bool:
        """Whether any rank is to stop, from the sum of their flags: then all are, for the same reason."""
        if flags[1] and not self.asked:
            self.shortage = "on another rank"
        return any(flags)

    def short_of_memory(self, left: str, *, at_once: bool) -> None:
        """Called by another thread. at_once: the next step's end, or a checkpoint, may be too late."""
        if self.shortage is None:
            self.shortage = left
            self._say(f"memory runs low ({left}): saving the last step, then stopping")
        if at_once and not self._exhausted:
            self._exhausted = True
            _thread.interrupt_main(signal.SIGTERM)

    def stopped(self, message: str) -> Interrupted:
        """The error that ends the command once all is saved."""
        if self.received is None and self.shortage is not None:
            reason = f"memory ran low ({self.shortage})"
            return Interrupted(f"{message}; {reason}", self.free_hint, reason=reason)
        return Interrupted(message, self._hint, self.received or signal.SIGINT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._exhausted:
            raise self.stopped("stopped at once, without saving")
        if self.received is not None:
            raise Interrupted("stopped at once, without saving", self._hint, number)
        self.received = number
        self._say(f"{signal.Signals(number).name}: saving the last step, then stopping; once more stops at once")


@contextmanager
def memory(what: str, hint: str) -> Iterator[None]:
    """Turn an allocation that failed into SparkError: `what` did not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ended(error):
            raise
        raise SparkError(f"not enough memory for {what}", hint) from None


def limit_memory(machine: Machine) -> None:
    """Where GPU and host share memory, make torch fail before the host hangs: it may have what is available now, less
    the host's reserve. Raises SparkError where that is nothing.
    """
    import torch

    if not (machine.unified_memory and torch.cuda.is_available()):
        return
    available = available_memory()
    if available <= HOST_RESERVE:
        raise SparkError(
            f"{available / 2**30:.1f} GiB of memory are left, and the host keeps {HOST_RESERVE / 2**30:.0f} GiB",
            "free some memory: `ps -eo rss,args --sort=-rss | head` shows who holds it",
        )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (available - HOST_RESERVE) / total))


def release() -> None:
    """Give back to the host what torch's allocator holds and does not use: saving may need it."""
    import torch

    torch.cuda.empty_cache()
