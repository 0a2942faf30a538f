"""x · σ(gate) and its gradients, one launch each way.

    y = x · σ(g),   dx = dy · σ(g),   dg = dy · x · σ(g) · (1 - σ(g))

T tokens · N heads · H head dim. The gate is read where q_proj left it, behind each head's query, and its gradient is
written there in q_proj's gradient: no copy either way. y and dy are rows of a wider buffer; backward writes y over dy
again, for the weight gradients of the projection behind. Bytes alone count: a program takes BLOCK values of a token.
fp32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _gate(g_ptr, token, cols, keep, g_token, g_head, H: tl.constexpr):
    at = token * g_token + cols // H * g_head + cols % H
    return at, tl.load(g_ptr + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _forward(x_ptr, g_ptr, y_ptr, width, g_token, g_head, y_stride, H: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < width
    _, g = _gate(g_ptr, token, cols, keep, g_token, g_head, H)
    x = tl.load(x_ptr + token * width + cols, mask=keep, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(g).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + token * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _backward(
    dy_ptr, x_ptr, g_ptr, dx_ptr, dg_ptr, width, g_token, g_head, dg_token, dg_head, dy_stride,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < width
    _, g = _gate(g_ptr, token, cols, keep, g_token, g_head, H)
    sigma = tl.sigmoid(g)
    x = tl.load(x_ptr + token * width + cols, mask=keep, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * dy_stride + cols, mask=keep, other=0.0).to(tl.float32)
    tl.store(dx_ptr + token * width + cols, (dy * sigma).to(dx_ptr.dtype.element_ty), mask=keep)
    to = token * dg_token + cols // H * dg_head + cols % H
    tl.store(dg_ptr + to, (dy * x * sigma * (1.0 - sigma)).to(dg_ptr.dtype.element_ty), mask=keep)
    y = x * sigma.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dy_ptr + token * dy_stride + cols, y.to(dy_ptr.dtype.element_ty), mask=keep)


def forward(x_TNH: torch.Tensor, gate_TNH: torch.Tensor, y_TM: torch.Tensor) -> None:
    """Write y [T, N·H]; x contiguous, gate and y in their last dimension."""
    tokens, heads, head_dim = x_TNH.shape
    width = heads * head_dim
    if tokens:
        _forward[(tokens, triton.cdiv(width, BLOCK))](
            x_TNH, gate_TNH, y_TM, width, gate_TNH.stride(0), gate_TNH.stride(1), y_TM.stride(0), head_dim, BLOCK
        )


def backward_(
    dy_TM: torch.Tensor, x_TNH: torch.Tensor, gate_TNH: torch.Tensor, dx_TNH: torch.Tensor, dgate_TNH: torch.Tensor
) -> None:
    """Write dx (contiguous) and dgate, and y over dy."""
    tokens, heads, head_dim = x_TNH.shape
    width = heads * head_dim
    if tokens:
        _backward[(tokens, triton.cdiv(width, BLOCK))](
            dy_TM, x_TNH, gate_TNH, dx_TNH, dgate_TNH, width, gate_TNH.stride(0), gate_TNH.stride(1),
            dgate_TNH.stride(0), dgate_TNH.stride(1), dy_TM.stride(0), head_dim, BLOCK,
        )  # fmt: skip
