"""What a kernel supposes of the strides that it is given."""

from __future__ import annotations

import torch


def lines(x: torch.Tensor) -> torch.Tensor:
    """x where its last dimension is contiguous, whatever the strides of the others, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
