"""What strikes a training in one of its micro-steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def at_step(patch: pytest.MonkeyPatch, engine: type, call: int, act: Callable[[Any], object]) -> None:
    """Do something with the engine in its micro-step of that number (from 1; the first are the rehearsal's)."""
    original, calls = engine.micro_step, [0]  # type: ignore[attr-defined]

    def micro_step(self: Any, pack: Any, scale: float) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == call:
            act(self)
        result: torch.Tensor = original(self, pack, scale)
        return result

    patch.setattr(engine, "micro_step", micro_step)
