"""The short causal convolution with SiLU and the unit length of keys and queries; documents kept apart by positions.

    p[t] = Σ_j w[c, W-1-j] · x[t-j, c]    over taps j ≤ position[t];      y = SiLU(p);     v = y
    q, k: n = y · r,   r = 1 / √(Σ y² + 1e-6) over a head's channels;      dy = r · (g - n · Σ g · n)
    dp = dy · σ(p) · (1 + p · (1 - σ(p)))
    dx[t] = Σ_j w[c, W-1-j] · dp[t+j]     over taps j ≤ position[t+j];    dw[c, W-1-j] = Σ_t dp[t] · x[t-j]

T tokens · C channels · W taps · D key dim (a power of two). Outputs are three tensors, as the delta rule wants them;
the unit length is done here, where the values are in registers: the library does it in two launches each way.
A program takes TOKENS x D values, one head of q or k or as many channels of v; the shifted rows come from L1.
Backward is two launches: the first makes dp (it needs whole heads, and adds up what several value heads give one key
head), the second gathers dx from it, so that no value is computed once a tap. The library's convolution takes 28 ms of
a step where its bytes need 3 (18 layers, 5,376 tokens, H200): nearly all of it is Python around the kernel. fp32
inside; dw is summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 32
PROGRAMS = 64  # partial sums of dw along the tokens


@triton.jit
def _part(q_ptr, k_ptr, v_ptr, block, KEY: tl.constexpr, V: tl.constexpr, D: tl.constexpr):
    """Where channel block `block` lives: (pointer, first channel in it, its width, 0 for q, 1 for k and 2 for v)."""
    ptr, first, width, part = q_ptr, block * D, KEY, 0
    if block >= 2 * (KEY // D):
        ptr, first, width, part = v_ptr, block * D - 2 * KEY, V, 2
    elif block >= KEY // D:
        ptr, first, part = k_ptr, block * D - KEY, 1
    return ptr, first, width, part


@triton.jit
def _window(x_ptr, w_ptr, positions_ptr, rows, channels, inside, T, x_stride, W: tl.constexpr):
    """p of the given rows, before SiLU, rounded as the reference rounds it."""
    position = tl.load(positions_ptr + rows, mask=rows < T, other=-1)
    p = tl.zeros([rows.shape[0], channels.shape[0]], tl.float32)
    for back in tl.static_range(W):
        w = tl.load(w_ptr + channels * W + (W - 1 - back), mask=inside, other=0.0)
        w = w.to(x_ptr.dtype.element_ty).to(tl.float32)
        keep = (position >= back)[:, None] & inside[None, :]
        x = tl.load(x_ptr + (rows - back)[:, None] * x_stride + channels[None, :], mask=keep, other=0.0)
        p += x.to(tl.float32) * w[None, :]
    return p.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _silu(p, dtype: tl.constexpr):
    return (p * tl.sigmoid(p)).to(dtype).to(tl.float32)


@triton.jit
def _forward(
    x_ptr, w_ptr, positions_ptr, q_ptr, k_ptr, v_ptr, T, x_stride,
    KEY: tl.constexpr, V: tl.constexpr, D: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    ptr, first, width, part = _part(q_ptr, k_ptr, v_ptr, block, KEY, V, D)
    lanes = tl.arange(0, D)
    inside = first + lanes < width
    p = _window(x_ptr, w_ptr, positions_ptr, rows, block * D + lanes, inside, T, x_stride, W)
    y = _silu(p, x_ptr.dtype.element_ty)
    if part < 2:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) + 1e-6)[:, None]
    keep = (rows < T)[:, None] & inside[None, :]
    tl.store(ptr + rows[:, None] * width + (first + lanes)[None, :], y.to(x_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _before(
    dq_ptr, dk_ptr, dv_ptr, dk2_ptr, x_ptr, w_ptr, positions_ptr, dp_ptr, T, x_stride,
    KEY: tl.constexpr, V: tl.constexpr, D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, SECOND: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    ptr, first, width, part = _part(dq_ptr, dk_ptr, dv_ptr, block, KEY, V, D)
    lanes = tl.arange(0, D)
    inside = first + lanes < width
    keep = (rows < T)[:, None] & inside[None, :]
    p = _window(x_ptr, w_ptr, positions_ptr, rows, block * D + lanes, inside, T, x_stride, W)
    dy = tl.zeros([TOKENS, D], tl.float32)
    if part < 2:
        for member in tl.static_range(GROUP):
            at = rows[:, None] * (KEY * GROUP) + (first * GROUP + member * D + lanes)[None, :]
            dy += tl.load(ptr + at, mask=keep, other=0.0).to(tl.float32)
            if SECOND:
                dy += tl.load(dk2_ptr + at, mask=keep & (part == 1), other=0.0).to(tl.float32)
        y = _silu(p, x_ptr.dtype.element_ty)
        r = tl.rsqrt(tl.sum(y * y, axis=1) + 1e-6)[:, None]
        n = y * r
        dy = r * (dy - n * tl.sum(dy * n, axis=1)[:, None])
    else:
        dy = tl.load(ptr + rows[:, None] * V + (first + lanes)[None, :], mask=keep, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(p)
    dp = dy * sigma * (1.0 + p * (1.0 - sigma))
    to = rows[:, None] * (2 * KEY + V) + (block * D + lanes)[None, :]
    tl.store(dp_ptr + to, dp.to(dp_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _input_gradient(
    dp_ptr, w_ptr, positions_ptr, dx_ptr, T, dx_stride, C, W: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * D + tl.arange(0, D)
    inside = channels < C
    dx = tl.zeros([TOKENS, D], tl.float32)
    for ahead in tl.static_range(W):
        later = rows + ahead
        position = tl.load(positions_ptr + later, mask=later < T, other=-1)
        keep = (position >= ahead)[:, None] & inside[None, :]
        dp = tl.load(dp_ptr + later[:, None] * C + channels[None, :], mask=keep, other=0.0)
        w = tl.load(w_ptr + channels * W + (W - 1 - ahead), mask=inside, other=0.0)
        dx += dp.to(tl.float32) * w.to(dx_ptr.dtype.element_ty).to(tl.float32)[None, :]
    keep = (rows < T)[:, None] & inside[None, :]
    tl.store(dx_ptr + rows[:, None] * dx_stride + channels[None, :], dx.to(dx_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _weight_gradient(
    dp_ptr, x_ptr, positions_ptr, dw_ptr, T, x_stride, C,
    W: tl.constexpr, WP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channels, taps = tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, WP)
    inside = channels < C
    dw = tl.zeros([WP, D], tl.float32)
    for turn in range(0, tl.cdiv(tl.cdiv(T, TOKENS) - part, parts)):
        rows = (part + turn * parts) * TOKENS + tl.arange(0, TOKENS)
        position = tl.load(positions_ptr + rows, mask=rows < T, other=-1)
        keep = (rows < T)[:, None] & inside[None, :]
        dp = tl.load(dp_ptr + rows[:, None] * C + channels[None, :], mask=keep, other=0.0).to(tl.float32)
        for back in tl.static_range(W):
            at = (rows - back)[:, None] * x_stride + channels[None, :]
            x = tl.load(x_ptr + at, mask=(position >= back)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            dw += tl.where((taps == W - 1 - back)[:, None], tl.sum(dp * x, axis=0)[None, :], 0.0)
    to = (part * C + channels)[None, :] * W + taps[:, None]
    tl.store(dw_ptr + to, dw, mask=(taps < W)[:, None] & inside[None, :])


def forward(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, positions_T: torch.Tensor, key_heads: int, key_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v), contiguous; x in its last dimension, weight contiguous, positions int32."""
    tokens, key = x_TC.shape[0], key_heads * key_dim
    values = x_TC.shape[1] - 2 * key
    q, k = (x_TC.new_empty(tokens, key_heads, key_dim) for _ in range(2))
    v = x_TC.new_empty(tokens, values)
    if tokens:
        _forward[_grid(tokens, key_heads, key_dim, values)](
            x_TC, weight_CW, positions_T, q, k, v, tokens, x_TC.stride(0), key, values, key_dim, weight_CW.shape[1],
            TOKENS,
        )  # fmt: skip
    return q, k, v


def backward(
    dq_TND: torch.Tensor, dk_TND: torch.Tensor, dv_TV: torch.Tensor, dk2_TND: torch.Tensor | None, x_TC: torch.Tensor,
    weight_CW: torch.Tensor, positions_T: torch.Tensor, key_heads: int, dx_TC: torch.Tensor, want_weight: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Write dx. Gives dw in fp32 where wanted. N: value heads, whose gradients are added up for their key head."""
    (tokens, width), (_, heads, key_dim), taps = x_TC.shape, dq_TND.shape, weight_CW.shape[1]
    parts = min(PROGRAMS, triton.cdiv(tokens, TOKENS))
    dw = torch.empty(parts, width, taps, dtype=torch.float32, device=x_TC.device) if want_weight else None
    if tokens:
        dp, key = x_TC.new_empty(tokens, width), key_heads * key_dim
        grid = _grid(tokens, key_heads, key_dim, width - 2 * key)
        _before[grid](
            dq_TND, dk_TND, dv_TV, dk2_TND, x_TC, weight_CW, positions_T, dp, tokens, x_TC.stride(0),
            key, width - 2 * key, key_dim, taps, heads // key_heads, dk2_TND is not None, TOKENS,
        )  # fmt: skip
        _input_gradient[grid](
            dp, weight_CW, positions_T, dx_TC, tokens, dx_TC.stride(0), width, taps, key_dim, TOKENS
        )  # fmt: skip
        if dw is not None:
            _weight_gradient[(parts, grid[1])](
                dp, x_TC, positions_T, dw, tokens, x_TC.stride(0), width, taps, triton.next_power_of_2(taps), key_dim,
                TOKENS,
            )  # fmt: skip
    return dw.sum(0) if dw is not None else None


def _grid(tokens: int, key_heads: int, key_dim: int, values: int) -> tuple[int, int]:
    return triton.cdiv(tokens, TOKENS), 2 * key_heads + triton.cdiv(values, key_dim)
