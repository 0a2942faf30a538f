"""Forks of a process that has used torch."""

from __future__ import annotations

import torch


def mend_threads() -> None:
    """Call this first in a fork: torch makes its pool of threads anew there at the next use, which must not be one by
    several threads at once, as transformers loads a model ("Invalid thread pool!", now and then)."""
    torch.set_num_threads(torch.get_num_threads())
