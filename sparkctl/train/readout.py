"""What a device is still to come to, for the host to read once it is there: scalars, and moments of its work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Moment:
    """When the device will have done all that it was given until now; a CPU has done it."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._event, self._time = None, time.monotonic()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Let the device come this far, and no further."""
        if self._event:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment of the same device to this one, which was waited for."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time


class Readout:
    """Scalars (0-dim) on their way to the host. `float` of one waits for all that the device was given since; this
    waits for the scalars alone. there: the moment at which they are.
    """

    def __init__(self, scalars: Sequence[torch.Tensor], device: torch.device) -> None:
        import torch

        together = torch.stack(list(scalars))
        self._values = torch.empty_like(together, device="cpu", pin_memory=device.type == "cuda")
        self._values.copy_(together, non_blocking=True)
        self.there = Moment(device)

    def read(self) -> list[float]:
        """Their values."""
        self.there.wait()
        return self._values.tolist()
