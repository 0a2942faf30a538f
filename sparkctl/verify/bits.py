"""Two tensors that should be one and the same, to the bit; how far apart they are where they are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are the same: -0 is not 0, and a NaN is the same NaN."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """0 where all bits are the same, else the norm of the difference over a's: infinite where that is no number, and
    the least float where zeros differ in their sign alone."""
    if same_bits(a, b):
        return 0.0
    size = float(a.double().norm())
    far = float((a.double() - b.double()).norm()) / size if size else math.inf
    return max(far, math.ulp(0.0)) if math.isfinite(far) else math.inf
