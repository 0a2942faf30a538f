"""GatedDeltaNet's output norm in plain torch, as transformers computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# T tokens · N value heads · E value head dim


def gated_norm(x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / sqrt(mean(x²) + eps) · SiLU(z): the norm is rounded to x's dtype, the rest is fp32."""
    x = x_TNE.float()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TNE.dtype)
    return (weight_E * normed * F.silu(z_TNE.float())).to(x_TNE.dtype)
