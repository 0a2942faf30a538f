"""Kernels that do not fit a GB10, one for each reason; tests/kernels/test_compile.py reads the faults it prints."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl
from sparkctl_kernels import compiled


@triton.jit
def shared(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):  # noqa: ANN001, ANN201
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    at = rows[:, None] * N + cols[None, :]
    for i in range(0, 8):
        a = tl.load(x_ptr + i * M * N + at)
        tl.store(y_ptr + i * M * M + rows[:, None] * M + rows[None, :], tl.dot(a, tl.trans(a)))


@triton.jit
def spilling(x_ptr, y_ptr, T, N: tl.constexpr):  # noqa: ANN001, ANN201
    cols = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    other = tl.zeros([N], tl.float32)
    for i in range(0, T):
        x = tl.load(x_ptr + i * N + cols)
        total += x
        other += x * total
    tl.store(y_ptr + cols, total + other)


@triton.jit
def scalar(x_ptr, y_ptr, N: tl.constexpr):  # noqa: ANN001, ANN201
    rows = tl.arange(0, N)
    at = rows[:, None] * N + rows[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, input_precision="ieee"))


def main(target: str) -> None:
    """Compile them for `target`."""
    x, y = (torch.empty(1 << 20, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    calls = {
        "greedy": [
            lambda: shared[(1,)](x, y, 256, 256, num_warps=8, num_stages=3),
            lambda: spilling[(1,)](y, y, 8, 16384, num_warps=4),
            lambda: scalar[(1,)](y, y, 32, num_warps=4),
        ]
    }
    print(json.dumps([fault for report in compiled.check(target, calls) for fault in report.faults(target)]))


if __name__ == "__main__":
    main(sys.argv[1])
