"""c = scale · a·b, or c + scale · a·b, in one launch; bf16 in, fp32 sums, c in bf16 or fp32.

    forward          y  [T, N] = x [T, K] · wᵀ         w [N, K], read along its rows
    input gradient   dx [T, K] = dy [T, N] · w
    weight gradient  dw [N, K] += dyᵀ · x              both read along their rows, dw in fp32

M rows · N columns · K summed over. The layouts are strides: a transposed view is as good as a matrix, and 1 among the
strides is compiled in. Programs run through GROUP row tiles before the next column tile, so that the tiles of b they
share are in L2. No sum is split, so the bits do not depend on what else runs. fp32 operands multiply in fp32.

Tiles are for sm_121a, which has mma.sync, 101,376 bytes of shared memory a block and, for tl.dot, at most 4 warps
(triton#10590). WIDE: its 128 x 128 sums are 128 registers of a thread; with 32 of K the operands stay in the rest, with
64 of K 13 instructions of the loop go to the stack. What is added to must be read into registers too, and half of WIDE
is then the most without spills: TALL. SMALL for products of fewer than FEW tiles, twice a GB10's 48 multiprocessors.
Six, four and four stages are 80, 72 and 48 KB there; on Hopper, where the same tiles run on wgmma, 96, 96 and 64.
Loads of 16 bytes need lines of whole eights. Triton sees sixteens by itself and has to be shown eights
(rank 8 on three projections: K + 24), else it loads them value by value through registers, and WIDE spills 512 bytes.
Lines that are neither, of toy models and ranks like 4, have SMALL, and eights that are added to: TALL spills 32 there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

GROUP = 8
FEW = 96
WARPS = 4


class Tile(NamedTuple):
    """Rows, columns and summed-over of a tile; stages of loads in flight."""

    rows: int
    columns: int
    depth: int
    stages: int


WIDE, TALL, SMALL = Tile(128, 128, 32, 6), Tile(128, 64, 64, 4), Tile(64, 64, 64, 4)


@triton.jit
def _eights(n):
    """n, which is a multiple of 8, in a form that shows it: a hint on an argument itself goes unheard."""
    return n // 8 * 8


@triton.jit
def _matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, am, ak, bk, bn, cm, scale,
    ADD: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EIGHTS: tl.constexpr, ALONG_A: tl.constexpr, ALONG_B: tl.constexpr,
):  # fmt: skip
    if EIGHTS:
        if ALONG_A:
            am, K = _eights(am), _eights(K)
        else:
            ak, M = _eights(ak), _eights(M)
        if ALONG_B:
            bk, N = _eights(bk), _eights(N)
        else:
            bn, K = _eights(bn), _eights(K)
    program, across = tl.program_id(0), tl.cdiv(N, BN)
    first = program // (GROUP * across) * GROUP
    high = min(tl.cdiv(M, BM) - first, GROUP)
    inside = program % (GROUP * across)
    rows = (first + inside % high) * BM + tl.arange(0, BM)
    cols = inside // high * BN + tl.arange(0, BN)
    deep = tl.arange(0, BK)
    row_there, col_there = (rows < M)[:, None], (cols < N)[None, :]
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * am + deep.to(tl.int64)[None, :] * ak
    b_ptrs = b_ptr + deep.to(tl.int64)[:, None] * bk + cols.to(tl.int64)[None, :] * bn
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if WHOLE:
            a = tl.load(a_ptrs, mask=row_there, other=0.0)
            b = tl.load(b_ptrs, mask=col_there, other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_there & (deep < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=col_there & (deep < K - k)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BK * ak
        b_ptrs += BK * bk
    total = total * scale
    c_ptrs = c_ptr + rows.to(tl.int64)[:, None] * cm + cols[None, :]
    if ADD:
        total += tl.load(c_ptrs, mask=row_there & col_there, other=0.0).to(tl.float32)
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=row_there & col_there)


def tile_for(rows: int, columns: int, add: bool, line: int) -> Tile:
    """The tile of a product of this size; lines of a and b are whole sixteens, eights or ones."""
    tile = TALL if add else WIDE
    return tile if line >= (16 if add else 8) and _tiles(tile, rows, columns) >= FEW else SMALL


def _tiles(tile: Tile, rows: int, columns: int) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)


def matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, c_MN: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """Write c, or add to it; c contiguous in its last dimension, a and b with any strides."""
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    if not rows or not columns:
        return
    line = next(unit for unit in (16, 8, 1) if unit == 1 or _lines_in(a_MK, b_KN, unit))
    tile = tile_for(rows, columns, add, line)
    _matmul[(_tiles(tile, rows, columns),)](
        a_MK, b_KN, c_MN, rows, columns, depth, *a_MK.stride(), *b_KN.stride(), c_MN.stride(0), scale,
        add, depth % tile.depth == 0, tile.rows, tile.columns, tile.depth, GROUP,
        line == 8, a_MK.stride(1) == 1, b_KN.stride(1) == 1,
        num_warps=WARPS, num_stages=tile.stages,
    )  # fmt: skip


def _lines_in(a_MK: torch.Tensor, b_KN: torch.Tensor, unit: int) -> bool:
    """Whether rows or columns of both follow each other in memory, and begin and end at multiples of `unit` values."""
    lines = [x if x.stride(1) == 1 else x.T for x in (a_MK, b_KN)]
    return all(x.stride(1) == 1 and x.shape[1] % unit == 0 and x.stride(0) % unit == 0 for x in lines)
