"""RMSNorm as transformers computes it: fp32 inside, one rounding at the end."""

from __future__ import annotations

import torch

# T tokens · D width of a row


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight), in fp32, rounded to `dtype`, by default x's.

    `offset` is 1 for Qwen3.5, whose weights are stored around zero, and 0 elsewhere. Qwen3.5 multiplies in fp32 and
    rounds once; the families with offset 0 round the normed row to x's dtype first, and so does this.
    """
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = normed * (offset + weight_D.float()) if offset else weight_D * normed.to(x_TD.dtype)
    return y.to(dtype or x_TD.dtype)


def add_rms_norm(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    offset: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after an addition, in the residual's dtype, and its norm: (rms_norm(s), s = x + residual)."""
    summed = x_TD.to(residual_TD.dtype) + residual_TD
    return rms_norm(summed, weight_D, eps, offset, dtype), summed
