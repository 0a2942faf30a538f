"""The device that a plan is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkctl.errors import UsageError

if TYPE_CHECKING:
    import torch


def planned_device(kind: str, name: str) -> torch.device:
    """The CPU or this process's GPU, by its number: to transformers a bare `cuda` is the first GPU, in every rank.

    Raises UsageError where the plan is for a GPU, `kind` cuda, and there is none. name: the run in hints."""
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "the plan is for a GPU, and torch finds none", f"plan for this machine: `sparkctl recommend {name}`"
        )
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
