"""Cross-entropy over rows of logits, and the gradient written over them.

    loss = log Σ exp(z) - z[label],     dz = (softmax(z) - onehot(label)) · scale

N rows · V vocabulary. A program owns one row: pass one keeps a running maximum and sum in fp32 over blocks of BLOCK
logits, pass two writes dz where z stood. Two reads and one write of bf16 logits: at V = 248,320 a row is half a MB,
which stays in the L2 cache between the passes. The loop order is fixed, so the bits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # 8 warps of 16 values a thread


@triton.jit
def _cross_entropy(z_ptr, label_ptr, loss_ptr, V, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    label = tl.load(label_ptr + row)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(high, z)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - shift) + tl.exp(z - shift)
        high = new
    top = tl.max(high)
    log_sum = top + tl.log(tl.sum(total * tl.exp(high - top)))
    picked = tl.load(z_ptr + label).to(tl.float32)
    tl.store(loss_ptr + row, log_sum - picked)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read z[label] before any writes over it
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            dz = tl.exp(z - log_sum)
            dz = tl.where(cols == label, dz - 1.0, dz) * scale
            tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=cols < V)


def cross_entropy_(logits_NV: torch.Tensor, labels_N: torch.Tensor, losses_N: torch.Tensor, scale: float, gradient: bool) -> None:  # fmt: skip  # noqa: E501
    """Write the loss of each row (fp32); with `gradient` the contiguous logits become scale · dloss/dlogits."""
    rows, vocabulary = logits_NV.shape
    if rows:
        _cross_entropy[(rows,)](logits_NV, labels_N, losses_N, vocabulary, scale, gradient, BLOCK, num_warps=8)
