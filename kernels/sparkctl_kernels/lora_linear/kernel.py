"""Rounding every master into its compute copy in one launch.

    copy[i, j] = master[i, j] · factor

Masters are contiguous fp32 matrices, copies parts of wider ones: B's stand as columns beside the weights, where torch
needs a launch each, 187 after every optimiser step of a 2B. A table on the device holds the addresses. A program takes
BLOCK values of one matrix. Widths are multiples of ALIGNED except in toy models; there a load takes a single value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 4096
ALIGNED = 8  # values that a load or store takes at once


@triton.jit
def _round(table_ptr, factors_ptr, blocks_ptr, like_ptr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    block = tl.program_id(0)
    matrix, number = tl.load(blocks_ptr + block * 2), tl.load(blocks_ptr + block * 2 + 1)
    entry = table_ptr + matrix * 5
    master = tl.load(entry).to(tl.pointer_type(tl.float32))
    copy = tl.load(entry + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
    size, width, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    if ALIGNED > 1:
        master, copy = tl.multiple_of(master, 16), tl.multiple_of(copy, 16)
        size, width, stride = (
            tl.multiple_of(size, ALIGNED), tl.multiple_of(width, ALIGNED), tl.multiple_of(stride, ALIGNED)
        )  # fmt: skip
    at = number * BLOCK + tl.arange(0, BLOCK)  # see Table: no matrix has 2³¹ values
    values = tl.load(master + at, mask=at < size, other=0.0) * tl.load(factors_ptr + matrix)
    if stride == width:
        tl.store(copy + at, values.to(like_ptr.dtype.element_ty), mask=at < size)
    else:
        narrow = tl.multiple_of(width.to(tl.int32), ALIGNED)
        to = (at // narrow).to(tl.int64) * stride + at % narrow
        tl.store(copy + to, values.to(like_ptr.dtype.element_ty), mask=at < size)


class Table:
    """Where masters and copies lie; as long as none of them moves it is made once."""

    def __init__(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        rows, blocks = [], []
        for number, (copy, master, _) in enumerate(copies):
            assert master.is_contiguous()
            assert master.dtype == torch.float32
            assert master.numel() < 2**31 - BLOCK
            width, stride = (copy.shape[-1], copy.stride(0)) if copy.ndim > 1 else (copy.numel(), copy.numel())
            rows.append([master.data_ptr(), copy.data_ptr(), master.numel(), width, stride])
            blocks += [[number, i] for i in range(triton.cdiv(master.numel(), BLOCK))]
        device = copies[0][0].device
        whole = all(value % 16 == 0 for row in rows for value in row[:2])
        whole &= all(value % ALIGNED == 0 for row in rows for value in row[2:])
        self._aligned = ALIGNED if whole else 1
        self._like = copies[0][0]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        self._factors = torch.tensor([factor for *_, factor in copies], dtype=torch.float32, device=device)
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)

    def round(self) -> None:
        """Write every copy."""
        _round[(len(self._blocks),)](self._table, self._factors, self._blocks, self._like, BLOCK, self._aligned)
