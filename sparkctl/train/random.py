"""The generators that training could draw from, Python's, numpy's and torch's: those of the first rank are saved with a
checkpoint, put back by resume and after a rehearsal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, torch.Tensor]:
    """The states as small tensors: python, numpy, torch, cuda.0 …"""
    import numpy as np
    import torch

    _, words, _ = random.getstate()
    legacy: Any = np.random.get_state()
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*legacy[1].tolist(), legacy[2]], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def restore(states: dict[str, torch.Tensor]) -> None:
    """Put captured states back; those of GPUs that this machine lacks are left out."""
    import numpy as np
    import torch

    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever the block draws, afterwards the generators stand where they stood."""
    states = capture()
    try:
        yield
    finally:
        restore(states)
