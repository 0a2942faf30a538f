"""What stops a training before harm is done: a loss that is no number, a signal, memory that runs out."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sparkctl.errors import AGAIN, Interrupted, NoMemory, SparkError, Terminated, memory_ended
from sparkctl.hardware.machine import HOST_RESERVE, available_memory

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.manifest.schema import Machine

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
SHOWN = 12  # documents named in a message
# from the thread that looks at memory to the main one, which may wait for a lock or a file; from without, as a cluster
# sends it before it takes the machine back, it asks to stop as SIGTERM does
KNOCK = signal.SIGUSR1
ECHO = 2.0  # seconds in which a relayed signal is the same one again
FREE = "free some memory (`ps -eo rss,args --sort=-rss | head` shows who holds it)"


class Numbers:
    """Checks losses and gradient norms before their step is saved.

    place: says where a document was read. base: looked up where a number is none; gives what is wrong with the weights
    that are trained on, whose fault it is then.
    """

    def __init__(
        self, place: Callable[[int], str], hint: str, base: Callable[[], SparkError | None] = lambda: None
    ) -> None:
        self._place, self._hint, self._base = place, hint, base

    def check(self, step: int, packs: Sequence[Pack], sums: Sequence[float]) -> None:
        """Raise SparkError naming the first pack of optimiser step `step` whose loss is NaN or infinite."""
        for pack, loss in zip(packs, sums, strict=True):
            if not math.isfinite(loss):
                raise self._error(f"the loss of step {step} is {loss} in the pack of {self._name([pack])}")

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
        """The error that names the packs' documents, unless the base is to blame."""
        return self._error(f"{what} is {value}, with {self._name(packs)}")

    def _error(self, message: str) -> SparkError:
        return self._base() or SparkError(message, self._hint)

    def _name(self, packs: Sequence[Pack]) -> str:
        ids = [document.id for pack in packs for document in pack.documents]
        named = ", ".join(f"{id} ({self._place(id)})" for id in ids[:SHOWN])
        return f"documents {named}" + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


class AtOnce(BaseException):
    """Stop here, unsaved, with that error. No Exception, so that no `except` of a library takes it for a failure of
    its own."""

    def __init__(self, error: Interrupted) -> None:
        super().__init__()
        self.error = error


class Signals:
    """What asks a training to stop: SIGINT, SIGTERM, a terminal that is closed (SIGHUP, unless `nohup` has it ignored),
    memory that runs low (`train/watch.py` looks at it).

    The first is noted for the loop to act on; a second signal, or hardly any memory left, stops at once, but not a
    second SIGHUP, since shell and kernel both send one. The handlers from before come back at the block's end. `say`
    tells the user; `hint` is how to go on. relayed: by torchrun, which passes on what is sent to it, so that what a
    service manager or a terminal sends to every process arrives twice, and which sends SIGTERM where a rank has ended:
    neither is a second word.
    """

    def __init__(self, hint: str, say: Callable[[str], None], *, relayed: bool = False) -> None:
        self.received: int | None = None
        self.shortage: str | None = None  # what was left of the memory, in words
        self._hint, self._say = hint, say
        self._exhausted = False
        self._relayed = relayed
        self._received_at = 0.0

    @property
    def asked(self) -> bool:
        """Whether this process is to stop."""
        return self.received is not None or self.shortage is not None

    @property
    def free_hint(self) -> str:
        """How to go on where memory was short."""
        return f"{FREE}, then `{self._hint}`"

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch the signals inside the block, where `AtOnce` is raised; out of it comes its error. Call it in the main
        thread."""
        told = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal, KNOCK: self._on_knock}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            told[signal.SIGHUP] = self._on_hangup
        with _in_error(), handled(told):
            yield self

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
            knock()

    def stopped(self, message: str) -> Interrupted:
        """The error that ends the command once all is saved."""
        if self.received is None and self.shortage is not None:
            reason = f"memory ran low ({self.shortage})"
            return Interrupted(f"{message}; {reason}", self.free_hint, reason=reason)
        return Interrupted(message, self._hint, self.received or signal.SIGINT)

    def _on_knock(self, number: int, frame: FrameType | None) -> None:
        if not self._exhausted:  # it comes from without
            return self._on_signal(number, frame)
        raise AtOnce(self.stopped("stopped at once, without saving"))

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._on_signal(number, frame)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if self._relayed and (number == signal.SIGTERM or time.monotonic() - self._received_at < ECHO):
                return
            raise AtOnce(Interrupted("stopped at once, without saving", self._hint, number))
        self.received, self._received_at = number, time.monotonic()
        self._say(f"{signal.Signals(number).name}: saving the last step, then stopping; once more stops at once")


class Leaving:
    """What stops work that has nothing to save, such as loading a model: memory that runs low, at once.

    `doing`: that work, in the error. A signal ends it as it ends any command.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._shortage: str | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Raise Interrupted out of the block where memory runs low in it. Call it in the main thread."""
        with _in_error(), handled({KNOCK: self._on_knock}):
            yield

    def short_of_memory(self, left: str, *, at_once: bool) -> None:
        """Called by another thread."""
        if self._shortage is None:
            self._shortage = left
            knock()

    def _on_knock(self, number: int, frame: FrameType | None) -> None:
        if self._shortage is None:  # it comes from without
            raise Terminated
        reason = f"memory ran low ({self._shortage})"
        message = f"interrupted while {self._doing}; nothing to save; {reason}"
        raise AtOnce(Interrupted(message, f"{FREE}, then {AGAIN}", reason=reason))


def knock() -> None:
    """Interrupt the main thread. Raising in Python alone would not end its wait for a lock."""
    signal.pthread_kill(threading.main_thread().ident or 0, KNOCK)


@contextmanager
def handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """These signals' handlers inside the block; those from before come back at its end."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _in_error() -> Iterator[None]:
    """Out of the block comes the error that stops at once."""
    try:
        yield
    except AtOnce as stop:
        raise stop.error from None


@contextmanager
def memory(what: str, hint: str) -> Iterator[None]:
    """Turn an allocation that failed into NoMemory: `what` did not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ended(error):
            raise
        raise NoMemory(f"not enough memory for {what}", hint) from None


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
            FREE,
        )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (available - HOST_RESERVE) / total))


def release() -> None:
    """Give back to the host what torch's allocator holds and does not use: saving may need it."""
    import torch

    torch.cuda.empty_cache()
