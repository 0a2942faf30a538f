"""What stops a training before harm is done: a loss that is no number, a signal, memory that runs out."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sparkctl.errors import Interrupted, SparkError
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
    """SIGINT and SIGTERM while training: the first is noted for the loop to act on, a second stops at once.

    The handlers from before come back at the block's end. `say` tells the user; `hint` is how to go on.
    """

    def __init__(self, hint: str, say: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._hint, self._say = hint, say

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch the signals inside the block. Call it in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopped(self, message: str) -> Interrupted:
        """The error that ends the command once all is saved."""
        return Interrupted(message, self._hint, self.received or signal.SIGINT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Interrupted("stopped at once, without saving", self._hint, number)
        self.received = number
        self._say(f"{signal.Signals(number).name}: saving the last step, then stopping; once more stops at once")


@contextmanager
def memory(what: str, hint: str) -> Iterator[None]:
    """Turn an allocation that failed into SparkError: `what` did not fit."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise SparkError(f"not enough memory for {what}", hint) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise SparkError(f"not enough memory for {what}", hint) from None


def limit_memory(machine: Machine) -> None:
    """Where GPU and host share memory, make torch fail before the host hangs: it may have what is available now."""
    import torch

    if not (machine.unified_memory and torch.cuda.is_available()):
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.05, min(1.0, (available_memory() - HOST_RESERVE) / total)))
