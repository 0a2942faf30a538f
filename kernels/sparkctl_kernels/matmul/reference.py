"""A matrix product as torch computes it: summed in fp32, rounded once."""

from __future__ import annotations

import torch

# M rows · N columns · K summed over


def matmul(
    a_MK: torch.Tensor, b_KN: torch.Tensor, total_MN: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """scale · a·b in a's dtype; total + scale · a·b in that of `total`, fp32 for gradients."""
    if total_MN is None:
        return scale * (a_MK @ b_KN)
    return total_MN + scale * (a_MK.to(total_MN.dtype) @ b_KN.to(total_MN.dtype))
