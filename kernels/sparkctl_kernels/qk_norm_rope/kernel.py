"""Norm and rotation of queries and keys in one launch each way.

    n = x · rstd · (offset + w)           rstd = 1 / sqrt(mean(x²) + eps) over the head's H values
    y_i = n_i cos_i - n_{i+h} sin_i,  y_{i+h} = n_{i+h} cos_i + n_i sin_i   for i < h = R/2;  y = n behind R
    backward rotates by -angle, then is RMSNorm's gradient; dw sums over tokens and heads

T tokens · N query heads · K kv heads · H head dim, R rotated dims (powers of two). Heads are read where the projection
left them (the queries of Qwen3.5 lie between their gates), and their gradients are written into the projection's
gradient. A program takes a token, its query heads as one tile of up to 32 x 256 values on 4 or 8 warps, then its kv
heads. The rotated halves are loaded again (from L1) as tiles of their own: a gather of each value's partner would be
loads of two bytes. fp32 inside, cos and sin in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512  # partial sums of dw


@triton.jit
def _scale(w_ptr, cols, OFFSET: tl.constexpr):
    w = tl.load(w_ptr + cols).to(tl.float32)
    if OFFSET:
        w += 1.0
    return w[None, :]


@triton.jit
def _rotate(first, second, cos_ptr, sin_ptr, token, HALF: tl.constexpr, SIGN: tl.constexpr):
    """Both halves turned by the token's angles, backwards where SIGN is -1."""
    at = token * HALF + tl.arange(0, HALF)
    cos, sin = tl.load(cos_ptr + at)[None, :], SIGN * tl.load(sin_ptr + at)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _forward_heads(
    x_ptr, y_ptr, w_ptr, cos_ptr, sin_ptr, token, token_stride, head_stride, eps,
    N: tl.constexpr, NP: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    heads, cols, lanes = tl.arange(0, NP), tl.arange(0, H), tl.arange(0, HALF)
    keep = (heads < N)[:, None]
    x_ptr += token * token_stride + heads[:, None] * head_stride
    y_ptr += (token * N + heads[:, None]) * H
    first = tl.load(x_ptr + lanes[None, :], mask=keep, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + lanes[None, :], mask=keep, other=0.0).to(tl.float32)
    if NORM or 2 * HALF < H:
        x = tl.load(x_ptr + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        if NORM:
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)[:, None]
            x = x * rstd * _scale(w_ptr, cols, OFFSET)
            first = first * rstd * _scale(w_ptr, lanes, OFFSET)
            second = second * rstd * _scale(w_ptr, HALF + lanes, OFFSET)
        if 2 * HALF < H:
            tl.store(y_ptr + cols[None, :], x.to(y_ptr.dtype.element_ty), mask=keep & (cols >= 2 * HALF)[None, :])
    first, second = _rotate(first, second, cos_ptr, sin_ptr, token, HALF, 1)
    tl.store(y_ptr + lanes[None, :], first.to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(y_ptr + HALF + lanes[None, :], second.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _forward(
    xq_ptr, xk_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, q_token, q_head, k_token, k_head, eps,
    N: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    _forward_heads(
        xq_ptr, q_ptr, qw_ptr, cos_ptr, sin_ptr, token, q_token, q_head, eps, N, NP, H, HALF, OFFSET, NORM
    )  # fmt: skip
    _forward_heads(
        xk_ptr, k_ptr, kw_ptr, cos_ptr, sin_ptr, token, k_token, k_head, eps, K, KP, H, HALF, OFFSET, NORM
    )  # fmt: skip


@triton.jit
def _backward_heads(
    dy_ptr, x_ptr, dx_ptr, w_ptr, cos_ptr, sin_ptr, token, token_stride, head_stride, dx_token, dx_head, eps,
    dw, dw1, dw2,
    N: tl.constexpr, NP: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dw of the dims behind the rotated ones, dw1 and dw2 of the rotated halves."""
    heads, cols, lanes = tl.arange(0, NP), tl.arange(0, H), tl.arange(0, HALF)
    keep = (heads < N)[:, None]
    behind = keep & (cols >= 2 * HALF)[None, :]
    dy_ptr += (token * N + heads[:, None]) * H
    x_ptr += token * token_stride + heads[:, None] * head_stride
    dx_ptr += token * dx_token + heads[:, None] * dx_head
    d1 = tl.load(dy_ptr + lanes[None, :], mask=keep, other=0.0).to(tl.float32)
    d2 = tl.load(dy_ptr + HALF + lanes[None, :], mask=keep, other=0.0).to(tl.float32)
    d1, d2 = _rotate(d1, d2, cos_ptr, sin_ptr, token, HALF, -1)
    if NORM or 2 * HALF < H:
        d = tl.load(dy_ptr + cols[None, :], mask=behind, other=0.0).to(tl.float32)
        if NORM:
            x = tl.load(x_ptr + cols[None, :], mask=keep, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)[:, None]
            n = x * rstd
            n1 = tl.load(x_ptr + lanes[None, :], mask=keep, other=0.0).to(tl.float32) * rstd
            n2 = tl.load(x_ptr + HALF + lanes[None, :], mask=keep, other=0.0).to(tl.float32) * rstd
            dw += tl.sum(d * n, axis=0)
            dw1 += tl.sum(d1 * n1, axis=0)
            dw2 += tl.sum(d2 * n2, axis=0)
            d *= _scale(w_ptr, cols, OFFSET)
            d1 *= _scale(w_ptr, lanes, OFFSET)
            d2 *= _scale(w_ptr, HALF + lanes, OFFSET)
            mean = (tl.sum(d * n, axis=1) + tl.sum(d1 * n1, axis=1) + tl.sum(d2 * n2, axis=1))[:, None] / H
            d, d1, d2 = rstd * (d - n * mean), rstd * (d1 - n1 * mean), rstd * (d2 - n2 * mean)
        if 2 * HALF < H:
            tl.store(dx_ptr + cols[None, :], d.to(dx_ptr.dtype.element_ty), mask=behind)
    tl.store(dx_ptr + lanes[None, :], d1.to(dx_ptr.dtype.element_ty), mask=keep)
    tl.store(dx_ptr + HALF + lanes[None, :], d2.to(dx_ptr.dtype.element_ty), mask=keep)
    return dw, dw1, dw2


@triton.jit
def _store_weights(dw_ptr, dw, dw1, dw2, H: tl.constexpr, HALF: tl.constexpr):
    cols, lanes = tl.arange(0, H), tl.arange(0, HALF)
    tl.store(dw_ptr + cols, dw, mask=cols >= 2 * HALF)
    tl.store(dw_ptr + lanes, dw1)
    tl.store(dw_ptr + HALF + lanes, dw2)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, xq_ptr, xk_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dxq_ptr, dxk_ptr, dw_ptr, T,
    q_token, q_head, k_token, k_head, dxq_token, dxq_head, dxk_token, dxk_head, eps,
    N: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
    OFFSET: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    dqw, dkw = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
    dqw1, dqw2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    dkw1, dkw2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for turn in range(0, tl.cdiv(T - first, programs)):
        token = first + turn * programs
        dqw, dqw1, dqw2 = _backward_heads(
            dq_ptr, xq_ptr, dxq_ptr, qw_ptr, cos_ptr, sin_ptr, token, q_token, q_head, dxq_token, dxq_head, eps,
            dqw, dqw1, dqw2, N, NP, H, HALF, OFFSET, NORM,
        )  # fmt: skip
        dkw, dkw1, dkw2 = _backward_heads(
            dk_ptr, xk_ptr, dxk_ptr, kw_ptr, cos_ptr, sin_ptr, token, k_token, k_head, dxk_token, dxk_head, eps,
            dkw, dkw1, dkw2, K, KP, H, HALF, OFFSET, NORM,
        )  # fmt: skip
    if WEIGHT:
        _store_weights(dw_ptr + first * 2 * H, dqw, dqw1, dqw2, H, HALF)
        _store_weights(dw_ptr + first * 2 * H + H, dkw, dkw1, dkw2, H, HALF)


def _warps(heads: int, head_dim: int) -> int:
    return min(8, max(4, triton.next_power_of_2(heads) * head_dim // 512))


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None,
    cos_Th: torch.Tensor, sin_Th: torch.Tensor, eps: float, offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `reference.qk_norm_rope`, results contiguous; inputs in their last dimension, cos and sin fp32 contiguous."""
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    q, k = q_TNH.new_empty(q_TNH.shape), k_TKH.new_empty(k_TKH.shape)
    if tokens:
        _forward[(tokens,)](
            q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, q, k,
            q_TNH.stride(0), q_TNH.stride(1), k_TKH.stride(0), k_TKH.stride(1), eps,
            heads, kv_heads, triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads), head_dim,
            cos_Th.shape[1], bool(offset), q_weight_H is not None, num_warps=_warps(heads, head_dim),
        )  # fmt: skip
    return q, k


def backward(
    dq_TNH: torch.Tensor, dk_TKH: torch.Tensor, q_TNH: torch.Tensor, k_TKH: torch.Tensor,
    q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None, cos_Th: torch.Tensor, sin_Th: torch.Tensor,
    eps: float, offset: float, dxq_TNH: torch.Tensor, dxk_TKH: torch.Tensor, want_weights: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Write the gradients of the projections' outputs. Gives those of the weights, fp32 [2, H], where wanted."""
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    programs = min(PROGRAMS, tokens) if want_weights else tokens
    dw = torch.empty(programs, 2, head_dim, dtype=torch.float32, device=q_TNH.device) if want_weights else None
    if tokens:
        _backward[(programs,)](
            dq_TNH, dk_TKH, q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, dxq_TNH, dxk_TKH, dw, tokens,
            q_TNH.stride(0), q_TNH.stride(1), k_TKH.stride(0), k_TKH.stride(1),
            dxq_TNH.stride(0), dxq_TNH.stride(1), dxk_TKH.stride(0), dxk_TKH.stride(1), eps,
            heads, kv_heads, triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads), head_dim,
            cos_Th.shape[1], bool(offset), q_weight_H is not None, want_weights, num_warps=_warps(heads, head_dim),
        )  # fmt: skip
    return dw.sum(0) if dw is not None else None
