"""What strikes a training in one of its micro-steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparkctl.train import session


def at_step(patch: pytest.MonkeyPatch, engine: type, call: int, act: Callable[[Any], object]) -> None:
    """Do something with the engine in its micro-step of that number, from 1; a rehearsal's are not counted."""
    original, rehearsal = engine.micro_step, session.rehearse  # type: ignore[attr-defined]
    calls = [float("-inf")]

    def rehearse(*arguments: Any, **named: Any) -> None:
        rehearsal(*arguments, **named)
        calls[0] = 0

    def micro_step(self: Any, pack: Any, scale: float) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == call:
            act(self)
        result: torch.Tensor = original(self, pack, scale)
        return result

    patch.setattr(engine, "micro_step", micro_step)
    patch.setattr(session, "rehearse", rehearse)
