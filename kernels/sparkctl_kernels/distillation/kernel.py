"""KL divergence over rows of logits, and the gradient written over the student's.

    p = softmax(t),  q = softmax(z),  KL = Σ p (t - z) - log Σ exp t + log Σ exp z,     dz = (q - p) · scale · present

N rows · V vocabulary. A program owns one row: pass one keeps a running maximum and sum of the student's in fp32 over
blocks of BLOCK logits, pass two sums p (t - z) and writes dz where z stood. The teacher's log-sum-exp comes from a
kernel of its own, once for all its students: for three of them 13 passes over logits and 14 exponentials a token of the
vocabulary, 15 and 18 if each student's program made it again. A thousand rows are more than an L2 cache holds between
two passes. The loop order is fixed, so the bits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # 8 warps of 8 values a thread, of two rows at once


@triton.jit
def _log_sum(row_ptr, V, BLOCK: tl.constexpr):
    """log Σ exp of a row."""
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(high, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - shift) + tl.exp(x - shift)
        high = new
    top = tl.max(high)
    return top + tl.log(tl.sum(total * tl.exp(high - top)))


@triton.jit
def _log_sums(t_ptr, sum_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(sum_ptr + row, _log_sum(t_ptr + row * V, V, BLOCK))


@triton.jit
def _divergence(
    z_ptr, t_ptr, sum_ptr, present_ptr, loss_ptr, V, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    t_ptr += row * V
    present = tl.load(present_ptr + row)
    log_sum_t = tl.load(sum_ptr + row)
    log_sum_z = _log_sum(z_ptr, V, BLOCK)
    tl.debug_barrier()  # every thread has read its logits before any writes over them
    apart = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        p = tl.exp(t - log_sum_t)
        apart += p * (tl.where(cols < V, t, 0.0) - z)
        if GRADIENT:
            dz = (tl.exp(z - log_sum_z) - p) * (scale * present)
            tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=cols < V)
    tl.store(loss_ptr + row, (tl.sum(apart) - log_sum_t + log_sum_z) * present)


def log_sums(logits_NV: torch.Tensor) -> torch.Tensor:
    """log Σ exp of each row, fp32 [N]."""
    rows, vocabulary = logits_NV.shape
    sums = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows:
        _log_sums[(rows,)](logits_NV, sums, vocabulary, BLOCK, num_warps=8)
    return sums


def divergence_(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, teacher_sums_N: torch.Tensor, present_N: torch.Tensor,
    losses_N: torch.Tensor, scale: float, gradient: bool,
) -> None:  # fmt: skip
    """Write present · KL of each row (fp32); with `gradient` the contiguous student's logits become scale times its
    gradient. teacher_sums: `log_sums` of the teacher.
    """
    rows, vocabulary = student_NV.shape
    if rows:
        _divergence[(rows,)](
            student_NV, teacher_NV, teacher_sums_N, present_N, losses_N, vocabulary, scale, gradient, BLOCK, num_warps=8
        )
