"""Per-head RMSNorm and partial rotary embedding in plain torch, as transformers does them."""

from __future__ import annotations

import torch

# T tokens · N query heads · K kv heads · H head dim · R rotated dims (R ≤ H)


def norm(x_TNH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """RMSNorm over each head; offset as in rms_norm: 1 in Qwen3.5, rounded once, 0 in Qwen3, rounded twice."""
    x = x_TNH.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight_H.float())).to(x_TNH.dtype)
    return (weight_H * normed.to(x_TNH.dtype)).to(x_TNH.dtype)


def rotate(x_TNH: torch.Tensor, cos_Th: torch.Tensor, sin_Th: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dims, paired i with i + R/2. cos and sin are [T, R/2] in fp32, rounded to x's dtype as
    transformers rounds them."""
    half = cos_Th.shape[-1]
    cos = cos_Th.to(x_TNH.dtype)[:, None]
    sin = sin_Th.to(x_TNH.dtype)[:, None]
    first, second, rest = x_TNH[..., :half], x_TNH[..., half : 2 * half], x_TNH[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def qk_norm_rope(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None,
    cos_Th: torch.Tensor, sin_Th: torch.Tensor, eps: float, offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Queries and keys, normed where there are weights (Qwen3, Qwen3.5), and rotated."""
    if q_weight_H is not None and k_weight_H is not None:
        q_TNH, k_TKH = norm(q_TNH, q_weight_H, eps, offset), norm(k_TKH, k_weight_H, eps, offset)
    return rotate(q_TNH, cos_Th, sin_Th), rotate(k_TKH, cos_Th, sin_Th)
