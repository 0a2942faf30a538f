"""Causal attention within documents: flash attention forward, deterministic backward, small enough for sm_121a.

    S = q·kᵀ·scale (masked to the document, to the past, to the window),  P = exp(S - L),  L = log Σ exp S
    O = P·V
    δ = rowsum(dO ∘ O),  dP = dO·Vᵀ,  dS = P ∘ (dP - δ)
    dV = Pᵀ·dO,  dK = dSᵀ·q·scale,  dQ = dS·k·scale

T tokens · N query heads · K kv heads · H head dim (a power of two, up to 256). bf16 operands, fp32 accumulation; P and
dS are rounded to bf16 for their GEMMs as FlashAttention-2 rounds them. v and dv lie in the projection's output and its
gradient, hence their strides.

Tiles. A GB10's block has 101,376 bytes of shared memory and mma.sync, so accumulators live in registers: at H = 256 a
64 x 256 fp32 accumulator over 4 warps is 128 registers a thread, the most that leaves room for the rest (with 32 keys
instead of 16 it spills 72 bytes), and backward has two accumulators of 32 rows. Backward runs twice over the scores
instead of adding atomically: a pass per key block for dK and dV, a pass per query block for dQ; no two programs write
one value, so the bits repeat. The pass for dK and dV has its scores transposed, so that P and dS are left operands and
come from registers. 4 warps on a GB10: more of them race on compute capability 12.x (triton#10590). Programs of one
block's heads run side by side and share its keys in L2; blocks with most work come first.
Hopper's wgmma wants 64 rows and 8 warps. On an H200 six layers of the 2B at 5,376 tokens of 12 documents took .43 ms
forward and 2.2 ms backward; FlashAttention-2 as torch has it .67 and 4.5 (its deterministic backward gives a document's
head to few of 132 multiprocessors), with one document 1.7 and 9.8 instead of 3.1 and 15.5 (2026-11-26), and dispatch
takes them there. Strides are constants in that pass: as arguments they cost it 2 to 13 spills.

Keys that a row has to itself (`own`, for drafts), P of them with values, folded into what attention gave it, O₁ and L₁:

    L = log(exp L₁ + Σ exp s_j),  O = exp(L₁ - L)·O₁ + Σ p_j·v_j,      s_j = q·k_j·scale,  p_j = exp(s_j - L)
    ds_j = p_j ∘ (dO·v_j - δ)·scale,  dv_j = Σ p_j·dO,  dk_j = Σ ds_j·q,  dQ += Σ ds_j·k_j

The sums of dk and dv run over a kv head's query heads, which are one program with its row: every tensor is read and
written once, in plain torch's fp32 a dozen times (1.4 GB forward and 3 GB backward for 8,192 tokens of the 2B). At
H = 256 and four heads each warp has a head, so that sums over H stay within it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparkctl_kernels.attention.kept import TritonKept
from sparkctl_kernels.documents import Documents

LOG2E = tl.constexpr(1.4426950408889634)
WARPS = 4


class Tile(NamedTuple):
    """Queries and keys a program takes at once, stages of its software pipeline, warps.

    apart: each query head's part of its keys' gradients is made by a program of its own, and they are added up
    afterwards in the inputs' dtype, as FlashAttention-2 does: else a GPU with 132 multiprocessors stands half idle.
    """

    rows: int
    cols: int
    stages: int
    warps: int = WARPS
    apart: bool = False


Tiles = tuple[Tile, Tile, Tile]  # forward, backward for keys and values, backward for queries

# by head dim. None spills on sm_121a, each fits there
SMALL: dict[int, Tiles] = {
    256: (Tile(64, 16, 2), Tile(32, 32, 1), Tile(32, 32, 2)),
    128: (Tile(64, 32, 2), Tile(32, 32, 2), Tile(64, 32, 2)),
    64: (Tile(64, 64, 2), Tile(64, 32, 2), Tile(64, 64, 2)),
}
# where a window's mask wants registers too: as many kv heads as query heads, or one, took 56 and 16 bytes in SMALL
WINDOWED: dict[int, Tiles] = {
    256: (Tile(32, 32, 2), Tile(32, 32, 1), Tile(32, 32, 2)),
    128: SMALL[128],
    64: (Tile(64, 64, 2), Tile(64, 32, 2), Tile(64, 32, 2)),
}
# for wgmma and 232,448 bytes of shared memory
HOPPER: dict[int, Tiles] = {256: (Tile(128, 64, 2, 8), Tile(32, 64, 2, 8, apart=True), Tile(128, 32, 2, 8))}


def tiles(q_TNH: torch.Tensor, window: int | None) -> Tiles:
    """Those of the head dim, small ones (of tests) as 64, on this device or on what is compiled for."""
    head_dim = q_TNH.shape[2]
    if in_wide_tiles(q_TNH.device, head_dim):
        return HOPPER[head_dim]
    return (SMALL if window is None else WINDOWED)[max(64, head_dim)]


def in_wide_tiles(device: torch.device, head_dim: int) -> bool:
    """Whether there are tiles for wgmma, which are faster than FlashAttention-2."""
    if device.type == "cuda":
        return head_dim in HOPPER and torch.cuda.get_device_capability(device)[0] == 9
    return head_dim in HOPPER and device.type == "meta" and _compiled_for() == 90


def _compiled_for() -> int:
    arch: int = triton.runtime.driver.active.get_current_target().arch
    return arch


@triton.jit
def _scores(q, k, rows, cols, end, window, scale, WINDOW: tl.constexpr):
    """Scaled scores in base 2, masked to the past of the same document."""
    s = tl.dot(q, tl.trans(k)) * (scale * LOG2E)
    seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] < end)
    if WINDOW:
        seen = seen & (rows[:, None] - cols[None, :] < window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _rows(ptr, first, head, stride, lanes, cols, end, H: tl.constexpr):
    """Rows from `first` on of one head as [len(lanes), H], zero behind the document.

    The row alone is int64: within a tile offsets are small, and 64 bits for each cost registers that H = 256 lacks.
    """
    ptr += tl.cast(first, tl.int64) * stride + head * H
    return tl.load(ptr + lanes[:, None] * stride + cols[None, :], mask=(first + lanes < end)[:, None], other=0.0)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, l_ptr, table_ptr, T, scale, window, v_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(table_ptr + block * 3)
    start = tl.load(table_ptr + block * 3 + 1)
    end = tl.load(table_ptr + block * 3 + 2)
    kv_head = head // (N // K)
    lanes_m, lanes_n, cols = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, H)
    rows = first + lanes_m
    q = _rows(q_ptr, first, head, N * H, lanes_m, cols, end, H)
    high = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, H], tl.float32)
    low = start
    if WINDOW:
        low = start + tl.maximum(first - window + 1 - start, 0) // BN * BN
    for at in range(low, tl.minimum(first + BM, end), BN):
        keys = at + lanes_n
        k = _rows(k_ptr, at, kv_head, K * H, lanes_n, cols, end, H)
        s = _scores(q, k, rows, keys, end, window, scale, WINDOW)
        new = tl.maximum(high, tl.max(s, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(high - shift)
        total = total * decay + tl.sum(p, axis=1)
        v = _rows(v_ptr, at, kv_head, v_stride, lanes_n, cols, end, H)
        o = tl.dot(p.to(v.dtype), v, o * decay[:, None])
        high = new
    keep = rows < end
    o = o / tl.where(keep, total, 1.0)[:, None]
    o_ptr += first.to(tl.int64) * (N * H) + head * H
    tl.store(o_ptr + lanes_m[:, None] * (N * H) + cols[None, :], o.to(o_ptr.dtype.element_ty), mask=keep[:, None])
    tl.store(l_ptr + head.to(tl.int64) * T + rows, high + tl.log2(tl.where(keep, total, 1.0)), mask=keep)


@triton.jit
def _delta(do_ptr, o_ptr, delta_ptr, T, do_stride, N: tl.constexpr, NP: tl.constexpr, H: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, NP), tl.arange(0, H)
    keep = (heads < N)[:, None]
    inside = heads[:, None] * H + cols[None, :]
    do = tl.load(do_ptr + token * do_stride + inside, mask=keep, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + token * (N * H) + inside, mask=keep, other=0.0).to(tl.float32)
    tl.store(delta_ptr + heads.to(tl.int64) * T + token, tl.sum(do * o, axis=1), mask=heads < N)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, l_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, T, scale, window,
    v_stride: tl.constexpr, do_stride: tl.constexpr, dv_stride: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    part, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(table_ptr + block * 3)
    end = tl.load(table_ptr + block * 3 + 2)
    kv_head = part * MEMBERS // (N // K)
    lanes_m, lanes_n, cols = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, H)
    keys = first + lanes_n
    k = _rows(k_ptr, first, kv_head, K * H, lanes_n, cols, end, H)
    v = _rows(v_ptr, first, kv_head, v_stride, lanes_n, cols, end, H)
    dk = tl.zeros([BN, H], tl.float32)
    dv = tl.zeros([BN, H], tl.float32)
    last = end
    if WINDOW:
        last = tl.minimum(end, first + BN - 1 + window)
    for member in range(MEMBERS):
        head = part * MEMBERS + member
        log_sums, deltas = l_ptr + head.to(tl.int64) * T, delta_ptr + head.to(tl.int64) * T
        q_at = q_ptr + first.to(tl.int64) * (N * H) + head * H + lanes_m[:, None] * (N * H) + cols[None, :]
        do_at = do_ptr + first.to(tl.int64) * do_stride + head * H + lanes_m[:, None] * do_stride + cols[None, :]
        for at in range(first, last, BM):
            rows = at + lanes_m
            q = tl.load(q_at, mask=(rows < end)[:, None], other=0.0)
            log_sum = tl.load(log_sums + rows, mask=rows < end, other=float("inf"))
            seen = keys[:, None] <= rows[None, :]
            if WINDOW:
                seen = seen & (rows[None, :] - keys[:, None] < window)
            s = tl.dot(k, tl.trans(q)) * (scale * LOG2E)
            p = tl.exp2(tl.where(seen, s, float("-inf")) - log_sum[None, :])
            do = tl.load(do_at, mask=(rows < end)[:, None], other=0.0)
            dv = tl.dot(p.to(do.dtype), do, dv)
            delta = tl.load(deltas + rows, mask=rows < end, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
            q_at += BM * (N * H)
            do_at += BM * do_stride
    keep = (keys < end)[:, None]
    dk_ptr += first.to(tl.int64) * (N // MEMBERS * H) + part * H
    dv_ptr += first.to(tl.int64) * dv_stride + part * H
    inside = lanes_n[:, None] * (N // MEMBERS * H) + cols[None, :]
    tl.store(dk_ptr + inside, (dk * scale).to(dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + lanes_n[:, None] * dv_stride + cols[None, :], dv.to(dv_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, do_ptr, l_ptr, delta_ptr, dq_ptr, table_ptr, T, scale, window, v_stride, do_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(table_ptr + block * 3)
    start = tl.load(table_ptr + block * 3 + 1)
    end = tl.load(table_ptr + block * 3 + 2)
    kv_head = head // (N // K)
    lanes_m, lanes_n, cols = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, H)
    rows = first + lanes_m
    q = _rows(q_ptr, first, head, N * H, lanes_m, cols, end, H)
    do = _rows(do_ptr, first, head, do_stride, lanes_m, cols, end, H)
    log_sum = tl.load(l_ptr + head.to(tl.int64) * T + rows, mask=rows < end, other=float("inf"))
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < end, other=0.0)
    dq = tl.zeros([BM, H], tl.float32)
    low = start
    if WINDOW:
        low = start + tl.maximum(first - window + 1 - start, 0) // BN * BN
    for at in range(low, tl.minimum(first + BM, end), BN):
        keys = at + lanes_n
        k = _rows(k_ptr, at, kv_head, K * H, lanes_n, cols, end, H)
        p = tl.exp2(_scores(q, k, rows, keys, end, window, scale, WINDOW) - log_sum[:, None])
        v = _rows(v_ptr, at, kv_head, v_stride, lanes_n, cols, end, H)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    dq_ptr += first.to(tl.int64) * (N * H) + head * H
    to = lanes_m[:, None] * (N * H) + cols[None, :]
    tl.store(dq_ptr + to, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(rows < end)[:, None])


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, documents: Documents, window: int | None
) -> tuple[torch.Tensor, TritonKept]:
    """(o [T, N, H], what backward wants); v within a token."""
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    o = torch.empty_like(q_TNH)
    log_sum = torch.empty(heads, tokens, dtype=torch.float32, device=q_TNH.device)
    tile = tiles(q_TNH, window)[0]
    table = documents.query_blocks[tile.rows]
    _forward[(heads, len(table))](
        q_TNH, k_TKH, v_TKH, o, log_sum, table, tokens, head_dim**-0.5, window or 0, v_TKH.stride(0),
        heads, kv_heads, head_dim, tile.rows, tile.cols, window is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return o, TritonKept(q_TNH, k_TKH, v_TKH, o, log_sum)


def backward(
    do_TNH: torch.Tensor, saved: TritonKept, documents: Documents, window: int | None, dv_TKH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk), contiguous; writes dv. do and dv within a token."""
    q, k, v, o, log_sum = saved
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    dq, delta = torch.empty_like(q), torch.empty_like(log_sum)
    _delta[(tokens,)](
        do_TNH, o, delta, tokens, do_TNH.stride(0), heads, triton.next_power_of_2(heads), head_dim, num_warps=WARPS
    )
    inputs = (q, k, v, do_TNH, log_sum, delta)
    numbers, strides = (tokens, head_dim**-0.5, window or 0), (v.stride(0), do_TNH.stride(0))
    _, tile, tile_q = tiles(q, window)
    parts = heads if tile.apart else kv_heads
    dk = q.new_empty(tokens, parts, head_dim)
    dv = dv_TKH if parts == kv_heads else torch.empty_like(dk)
    table = documents.key_blocks[tile.cols]
    _backward_kv[(parts, len(table))](
        *inputs, dk, dv, table, *numbers, *strides, dv.stride(0), heads, kv_heads, head_dim,
        tile.rows, tile.cols, window is not None, heads // parts, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts != kv_heads:
        torch.sum(dv.unflatten(1, (kv_heads, -1)), 2, out=dv_TKH)
        dk = dk.unflatten(1, (kv_heads, -1)).sum(2)
    table = documents.query_blocks[tile_q.rows]
    _backward_q[(heads, len(table))](
        *inputs, dq, table, *numbers, *strides, heads, kv_heads, head_dim, tile_q.rows, tile_q.cols,
        window is not None, num_warps=tile_q.warps, num_stages=tile_q.stages,
    )  # fmt: skip
    return dq, dk


@triton.jit
def _own(
    q_ptr, k_ptr, v_ptr, first_ptr, past_ptr, o_ptr, l_ptr, T, P, scale, unit,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, cols = tl.arange(0, GP), tl.arange(0, H)
    heads = kv_head * (N // K) + group
    keep = group < N // K
    inside = token * (N * H) + heads[:, None] * H + cols[None, :]
    q = tl.load(q_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    o = tl.load(first_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    high = tl.load(past_ptr + heads.to(tl.int64) * T + token, mask=keep, other=0.0) * unit
    total = tl.full([GP], 1.0, tl.float32)
    own = token * (K * H) + kv_head * H + cols
    for _ in range(P):
        s = tl.sum(q * tl.load(k_ptr + own).to(tl.float32)[None, :], axis=1) * scale
        new = tl.maximum(high, s)
        decay = tl.exp(high - new)
        p = tl.exp(s - new)
        o = o * decay[:, None] + p[:, None] * tl.load(v_ptr + own).to(tl.float32)[None, :]
        total = total * decay + p
        high = new
        own += tl.cast(T, tl.int64) * (K * H)
    tl.store(o_ptr + inside, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=keep[:, None])
    tl.store(l_ptr + heads.to(tl.int64) * T + token, (high + tl.log(total)) / unit, mask=keep)


@triton.jit
def _own_backward(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, l_ptr, dq_ptr, dk_ptr, dv_ptr, T, P, scale, unit,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, cols = tl.arange(0, GP), tl.arange(0, H)
    heads = kv_head * (N // K) + group
    keep = group < N // K
    inside = token * (N * H) + heads[:, None] * H + cols[None, :]
    q = tl.load(q_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    do = tl.load(do_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    dq = tl.load(dq_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    o = tl.load(o_ptr + inside, mask=keep[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(do * o, axis=1)
    log_sum = tl.load(l_ptr + heads.to(tl.int64) * T + token, mask=keep, other=0.0) * unit
    own = token * (K * H) + kv_head * H + cols
    for _ in range(P):
        k = tl.load(k_ptr + own).to(tl.float32)[None, :]
        v = tl.load(v_ptr + own).to(tl.float32)[None, :]
        p = tl.exp(tl.sum(q * k, axis=1) * scale - log_sum)
        ds = p * (tl.sum(do * v, axis=1) - delta) * scale
        dq += ds[:, None] * k
        tl.store(dk_ptr + own, tl.sum(ds[:, None] * q, axis=0).to(dk_ptr.dtype.element_ty))
        tl.store(dv_ptr + own, tl.sum(p[:, None] * do, axis=0).to(dv_ptr.dtype.element_ty))
        own += tl.cast(T, tl.int64) * (K * H)
    tl.store(dq_ptr + inside, dq.to(dq_ptr.dtype.element_ty), mask=keep[:, None])


def own(
    q_TNH: torch.Tensor, k_PTKH: torch.Tensor, v_PTKH: torch.Tensor, first_TNH: torch.Tensor, past_NT: torch.Tensor,
    unit: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(O [T, N, H], L fp32 [N, T]) from attention's output and log-sum-exp; all contiguous.

    unit: what makes a natural logarithm of those in L.
    """
    o, log_sum = torch.empty_like(first_TNH), torch.empty_like(past_NT)
    grid, sizes, numbers = _own_launch(q_TNH, k_PTKH)
    _own[grid](
        q_TNH, k_PTKH, v_PTKH, first_TNH, past_NT, o, log_sum, *numbers, unit, *sizes, num_warps=WARPS
    )  # fmt: skip
    return o, log_sum


def own_backward_(
    dq_TNH: torch.Tensor, do_TNH: torch.Tensor, q_TNH: torch.Tensor, k_PTKH: torch.Tensor, v_PTKH: torch.Tensor,
    o_TNH: torch.Tensor, log_sum_NT: torch.Tensor, unit: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dk, dv) [P, T, K, H]; adds to dq what the own keys give. All contiguous."""
    dk, dv = torch.empty_like(k_PTKH), torch.empty_like(v_PTKH)
    grid, sizes, numbers = _own_launch(q_TNH, k_PTKH)
    _own_backward[grid](
        q_TNH, k_PTKH, v_PTKH, do_TNH, o_TNH, log_sum_NT, dq_TNH, dk, dv, *numbers, unit, *sizes, num_warps=WARPS
    )  # fmt: skip
    return dk, dv


def _own_launch(
    q_TNH: torch.Tensor, k_PTKH: torch.Tensor
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int, float]]:
    """The grid; N, K, H and the group of query heads padded; T, P and the scores' scale."""
    (pairs, tokens, kv_heads, head_dim), heads = k_PTKH.shape, q_TNH.shape[1]
    padded = triton.next_power_of_2(heads // kv_heads)
    return (tokens, kv_heads), (heads, kv_heads, head_dim, padded), (tokens, pairs, head_dim**-0.5)
