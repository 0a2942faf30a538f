"""What a projection with an adapter computes, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# T tokens · K input width · N output width · r rank


def lora_linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None,
    a_rK: torch.Tensor | None, b_Nr: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """x·Wᵀ + bias + scale · (x·Aᵀ)·Bᵀ, every product in x's dtype, adapters (fp32 masters) rounded to it first."""
    y = F.linear(x_TK, weight_NK, bias_N)
    if a_rK is None or b_Nr is None:
        return y
    return y + scale * F.linear(F.linear(x_TK, a_rK.to(x_TK.dtype)), b_Nr.to(x_TK.dtype))
