"""SiLU(gate) · up and its gradients, one launch each way, the gradients written where gate and up stood.

    y   = SiLU(g) · u,            SiLU(g) = g · σ(g)
    dg  = dy · u · σ(g) · (1 + g · (1 - σ(g))),   du = dy · SiLU(g)

T tokens · F width. gate_up is [T, 2F], gate left; y and dy are rows of a wider buffer. fp32 inside. Bytes alone count
(two values in, one out; three in, three out), so a program takes BLOCK values of a row: 16-byte loads for 4 warps, and
no more state. Gradients in place save 2·T·F values of peak memory, the largest activation of a layer; y, which the
weight gradients of the next projection need, is written over dy instead of being kept from forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _forward(gu_ptr, y_ptr, F, y_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    g = tl.load(gu_ptr + row * 2 * F + cols, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + row * 2 * F + F + cols, mask=keep, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gu_ptr.dtype.element_ty).to(tl.float32)  # the reference rounds here too
    tl.store(y_ptr + row * y_stride + cols, (silu * u).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _backward(dy_ptr, gu_ptr, F, dy_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    gate_ptr, up_ptr = gu_ptr + row * 2 * F + cols, gu_ptr + row * 2 * F + F + cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(up_ptr, mask=keep, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    silu = g * sigma
    tl.store(gate_ptr, (dy * u * sigma * (1.0 + g * (1.0 - sigma))).to(gu_ptr.dtype.element_ty), mask=keep)
    tl.store(up_ptr, (dy * silu).to(gu_ptr.dtype.element_ty), mask=keep)
    y = silu.to(gu_ptr.dtype.element_ty).to(tl.float32) * u
    tl.store(dy_ptr + row * dy_stride + cols, y.to(dy_ptr.dtype.element_ty), mask=keep)


def forward(gate_up_T2F: torch.Tensor, y_TF: torch.Tensor) -> None:
    """Write y; gate_up contiguous, y in its last dimension."""
    rows, width = y_TF.shape
    if rows:
        _forward[(rows, triton.cdiv(width, BLOCK))](gate_up_T2F, y_TF, width, y_TF.stride(0), BLOCK)


def backward_(dy_TF: torch.Tensor, gate_up_T2F: torch.Tensor) -> None:
    """Replace gate_up by its gradient and dy by y."""
    rows, width = dy_TF.shape
    if rows:
        _backward[(rows, triton.cdiv(width, BLOCK))](dy_TF, gate_up_T2F, width, dy_TF.stride(0), BLOCK)
