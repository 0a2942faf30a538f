"""GatedDeltaNet's output norm and its gradients, one launch each way.

    y  = n · SiLU(z) · w,   n = x · rstd,   rstd = 1 / sqrt(mean(x²) + eps) over a head's values
    dz = dy · w · n · σ(z) · (1 + z · (1 - σ(z)))
    dx = rstd · (g - n · mean(g · n)),   g = dy · w · SiLU(z)
    dw = Σ dy · n · SiLU(z) over tokens and heads

R rows (tokens · N value heads) · D value head dim (a power of two). A row is only 128 values, so a program takes ROWS
of them: 16 x 128 values fill 4 warps with 16-byte loads. z is read where its projection left it and dz is written into
that projection's gradient; y and dy are rows of a wider buffer, and backward writes y over dy for the weight gradients
of the projection behind. fp32 inside; dw is summed in a fixed order over PROGRAMS partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
PROGRAMS = 512


@triton.jit
def _places(rows, cols, stride, N: tl.constexpr, D: tl.constexpr):
    """Offsets of rows (token · N + head) in a tensor whose tokens are `stride` apart."""
    return (rows // N * stride + rows % N * D)[:, None] + cols[None, :]


@triton.jit
def _normed(x, w, silu, rstd, dtype: tl.constexpr):
    """y before its last rounding; the norm is rounded first, as the reference rounds it."""
    return w * (x * rstd).to(dtype).to(tl.float32) * silu


@triton.jit
def _forward(
    x_ptr, z_ptr, w_ptr, y_ptr, R, z_stride, y_stride, eps, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    keep = (rows < R)[:, None]
    x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + _places(rows, cols, z_stride, N, D), mask=keep, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols).to(tl.float32)[None, :]
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    y = _normed(x, w, z * tl.sigmoid(z), rstd, x_ptr.dtype.element_ty)
    tl.store(y_ptr + _places(rows, cols, y_stride, N, D), y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _backward(
    dy_ptr, x_ptr, z_ptr, w_ptr, dx_ptr, dz_ptr, dw_ptr, R, z_stride, dy_stride, dz_stride, eps,
    N: tl.constexpr, D: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    cols = tl.arange(0, D)
    w = tl.load(w_ptr + cols).to(tl.float32)[None, :]
    dw = tl.zeros([D], tl.float32)
    for turn in range(0, tl.cdiv(tl.cdiv(R, ROWS) - first, programs)):
        rows = (first + turn * programs) * ROWS + tl.arange(0, ROWS)
        keep = (rows < R)[:, None]
        at, at_y = rows[:, None] * D + cols[None, :], _places(rows, cols, dy_stride, N, D)
        dy = tl.load(dy_ptr + at_y, mask=keep, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + _places(rows, cols, z_stride, N, D), mask=keep, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        normed = x * rstd
        sigma = tl.sigmoid(z)
        silu = z * sigma
        g = dy * w * silu
        dx = rstd * (g - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
        dz = dy * w * normed * sigma * (1.0 + z * (1.0 - sigma))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
        tl.store(dz_ptr + _places(rows, cols, dz_stride, N, D), dz.to(dz_ptr.dtype.element_ty), mask=keep)
        y = _normed(x, w, silu, rstd, x_ptr.dtype.element_ty)
        tl.store(dy_ptr + at_y, y.to(dy_ptr.dtype.element_ty), mask=keep)
        if WEIGHT:
            dw += tl.sum(dy * normed * silu, axis=0)
    if WEIGHT:
        tl.store(dw_ptr + first * D + cols, dw)


def forward(x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float, y_TM: torch.Tensor) -> None:
    """Write y [T, N·E]; x contiguous, z and y within a token."""
    tokens, heads, width = x_TNE.shape
    rows = tokens * heads
    if rows:
        _forward[(triton.cdiv(rows, ROWS),)](
            x_TNE, z_TNE, weight_E, y_TM, rows, z_TNE.stride(0), y_TM.stride(0), eps, heads, width, ROWS
        )


def backward_(
    dy_TM: torch.Tensor, x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float,
    dx_TNE: torch.Tensor, dz_TNE: torch.Tensor, want_weight: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Write dx (contiguous) and dz, and y over dy. Gives dw in fp32 where wanted."""
    tokens, heads, width = x_TNE.shape
    rows = tokens * heads
    blocks = triton.cdiv(rows, ROWS)
    programs = min(PROGRAMS, blocks) if want_weight else blocks
    dw = torch.empty(programs, width, dtype=torch.float32, device=x_TNE.device) if want_weight else None
    if rows:
        _backward[(programs,)](
            dy_TM, x_TNE, z_TNE, weight_E, dx_TNE, dz_TNE, dw, rows, z_TNE.stride(0), dy_TM.stride(0),
            dz_TNE.stride(0), eps, heads, width, want_weight, ROWS,
        )  # fmt: skip
    return dw.sum(0) if dw is not None else None
