"""The depthwise causal convolution in plain torch; it never reaches into the document before."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# T tokens · C channels (2 · key heads · key dim + value width) · W taps · K key heads · D key dim · V value width


def causal_conv(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, positions_T: torch.Tensor, key_heads: int, key_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = SiLU(Σ_j weight[c, W-1-j] · x[t-j, c]) over the taps j that lie in t's own document.

    Gives q [T, K, D] and k [T, K, D], each head scaled to unit length, and v [T, V]. `positions_T` counts each
    document's tokens from 0. The sum is fp32 and rounded before SiLU, as torch's convolution in x's dtype rounds it.
    """
    taps, width = weight_CW.shape[1], key_heads * key_dim
    weight = weight_CW.to(x_TC.dtype).float()
    total = x_TC.float() * weight[:, taps - 1]
    for back in range(1, taps):
        shifted = F.pad(x_TC, (0, 0, back, 0))[: len(x_TC)].float()
        total = total + torch.where((positions_T >= back)[:, None], shifted, 0.0) * weight[:, taps - 1 - back]
    y = F.silu(total.to(x_TC.dtype))
    q, k, v = y.split([width, width, y.shape[1] - 2 * width], dim=1)
    return unit(q.unflatten(1, (key_heads, key_dim))), unit(k.unflatten(1, (key_heads, key_dim))), v


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / √(Σx² + 1e-6) over the last dimension, in fp32, rounded to x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
