"""RMSNorm and its gradient, a row a program; the sum with the residual is fused in front.

    s  = x + residual                     (rounded to the residual stream's dtype: it is what the next layer reads)
    y  = s · rstd · (offset + w),         rstd = 1 / sqrt(mean(s²) + eps)
    ds = rstd · (g - ŝ · mean(g · ŝ)) + d,  g = dy · (offset + w),  ŝ = s · rstd,  d = what reaches s from elsewhere
    dw = Σ_rows dy · ŝ

T tokens · D width. fp32 inside. A row of at most 8,192 values fits in the registers of 4 to 16 warps, so each direction
reads and writes every value once. rstd is computed again in backward: one row sum costs less than keeping another
tensor. y and dy are rows of a wider buffer (the input of a GEMM with adapters in its K dimension), hence their strides.
Backward can write y over dy: the weight gradients need y, and here it costs one write instead of a launch with a read.
dw is summed by PROGRAMS programs over their own rows and then over programs: the same order in each run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 256  # partial sums of dw: five waves on a GB10 (48 SMs), two on an H200 (132)


@triton.jit
def _normed(s, w, rstd, dtype: tl.constexpr, OFFSET: tl.constexpr):
    """y before its last rounding."""
    y = s * rstd
    if OFFSET:
        y = y * (1.0 + w)
    else:
        y = y.to(dtype).to(tl.float32) * w
    return y


@triton.jit
def _forward(
    x_ptr, residual_ptr, w_ptr, y_ptr, s_ptr, D, y_stride, eps,
    OFFSET: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    keep = cols < D
    s = tl.load(x_ptr + row * D + cols, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(residual_ptr + row * D + cols, mask=keep, other=0.0).to(tl.float32)
        s = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * D + cols, s, mask=keep)
        s = s.to(tl.float32)
    w = tl.load(w_ptr + cols, mask=keep, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s) / D + eps)
    y = _normed(s, w, rstd, s_ptr.dtype.element_ty, OFFSET)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _backward(
    dy_ptr, s_ptr, w_ptr, d_ptr, low_ptr, dw_ptr, T, D, dy_stride, eps,
    OFFSET: tl.constexpr, ADD: tl.constexpr, LOW: tl.constexpr, REMAKE: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    keep = cols < D
    dw = tl.zeros([BLOCK], tl.float32)
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for turn in range(0, tl.cdiv(T - first, programs)):
        row = first + turn * programs
        s = tl.load(s_ptr + row * D + cols, mask=keep, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=keep, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=keep, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(s * s) / D + eps)
        normed = s * rstd
        g = dy * (1.0 + w) if OFFSET else dy * w
        ds = rstd * (g - normed * (tl.sum(g * normed) / D))
        if ADD:
            ds += tl.load(d_ptr + row * D + cols, mask=keep, other=0.0).to(tl.float32)
        tl.store(d_ptr + row * D + cols, ds.to(d_ptr.dtype.element_ty), mask=keep)
        if LOW:
            tl.store(low_ptr + row * D + cols, ds.to(low_ptr.dtype.element_ty), mask=keep)
        if REMAKE:
            y = _normed(s, w, rstd, s_ptr.dtype.element_ty, OFFSET)
            tl.store(dy_ptr + row * dy_stride + cols, y.to(dy_ptr.dtype.element_ty), mask=keep)
        if WEIGHT:
            dw += dy * normed
    if WEIGHT:
        tl.store(dw_ptr + first * D + cols, dw, mask=keep)


def _warps(width: int, want_weight: bool = False) -> int:
    """16 values a thread; sums of dw beside them need registers that 16 warps don't have."""
    return min(8 if want_weight else 16, max(4, triton.next_power_of_2(width) // 512))


def forward(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, offset: float,
    y_TD: torch.Tensor, s_TD: torch.Tensor,
) -> None:  # fmt: skip
    """Write y and, with a residual, s (without one give x for s). All but y contiguous, y in its last dimension."""
    rows, width = x_TD.shape
    if rows:
        add = residual_TD is not None
        _forward[(rows,)](
            x_TD, residual_TD if add else x_TD, weight_D, y_TD, s_TD, width, y_TD.stride(0), eps,
            bool(offset), add, triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip


def backward(
    dy_TD: torch.Tensor, s_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, d_TD: torch.Tensor,
    *, add: bool, low_TD: torch.Tensor | None, remake: bool, want_weight: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Write ds over d, after adding d where `add`; a copy into low; y over dy where `remake`. Gives dw in fp32."""
    rows, width = s_TD.shape
    programs = min(PROGRAMS, rows) if want_weight else rows
    dw = torch.empty(programs, width, dtype=torch.float32, device=s_TD.device) if want_weight else None
    if rows:
        _backward[(programs,)](
            dy_TD, s_TD, weight_D, d_TD, low_TD, dw, rows, width, dy_TD.stride(0), eps,
            bool(offset), add, low_TD is not None, remake, want_weight, triton.next_power_of_2(width),
            num_warps=_warps(width, want_weight),
        )  # fmt: skip
    return dw.sum(0) if dw is not None else None
