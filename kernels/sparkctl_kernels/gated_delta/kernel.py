"""The gates of the delta rule and their gradients, one launch each way.

    λ = -exp(A_log) · softplus(a + dt_bias),   g = Σ λ / ln 2 within a chunk,   β = σ(b)
    dλ = Σ from the chunk's end of dg,   da = -dλ · exp(A_log) · σ(a + dt_bias),   db = dβ · β · (1 - β)
    dA_log = Σ dλ · λ,   ddt_bias = Σ da

T tokens · N value heads · C chunks of CHUNK tokens. A program takes a chunk with all its heads, 64 x 64 values at most;
a and b are read where their projection left them, da and db written into its gradient. fp32 throughout: g and β stay
so. The library makes g, β, the running sum and their gradients in six launches; here they are two, of 2 MB each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparkctl_kernels.documents import CHUNK, Documents

RCP_LN2 = tl.constexpr(1.4426950216)  # the library's constant: its kernels take g in base 2


@triton.jit
def _rows(chunks_ptr, cu_seqlens_ptr, CHUNK: tl.constexpr):
    """The chunk's rows, and which of them are in its document."""
    chunk = tl.program_id(0)
    document, number = tl.load(chunks_ptr + chunk * 2), tl.load(chunks_ptr + chunk * 2 + 1)
    rows = tl.load(cu_seqlens_ptr + document) + number * CHUNK + tl.arange(0, CHUNK)
    return rows.to(tl.int64), rows < tl.load(cu_seqlens_ptr + document + 1)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); its last term is what 1 + exp(x) rounds away: 2e-5 of a slow head's rate at -8, all at -17."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    return tl.maximum(x, 0.0) + tl.log(rounded) + (small - (rounded - 1.0)) / rounded


@triton.jit
def _forward(
    a_ptr, b_ptr, log_a_ptr, bias_ptr, g_ptr, beta_ptr, chunks_ptr, cu_seqlens_ptr, a_stride, b_stride,
    N: tl.constexpr, NP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows, inside = _rows(chunks_ptr, cu_seqlens_ptr, CHUNK)
    heads = tl.arange(0, NP)
    keep = inside[:, None] & (heads < N)[None, :]
    a = tl.load(a_ptr + rows[:, None] * a_stride + heads[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + rows[:, None] * b_stride + heads[None, :], mask=keep, other=0.0).to(tl.float32)
    log_a = tl.load(log_a_ptr + heads, mask=heads < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + heads, mask=heads < N, other=0.0).to(tl.float32)
    decay = -tl.exp(log_a)[None, :] * _softplus(a + bias[None, :])
    to = rows[:, None] * N + heads[None, :]
    tl.store(g_ptr + to, tl.cumsum(tl.where(keep, decay, 0.0), axis=0) * RCP_LN2, mask=keep)
    tl.store(beta_ptr + to, tl.sigmoid(b), mask=keep)


@triton.jit
def _backward(
    dg_ptr, dg2_ptr, dbeta_ptr, a_ptr, b_ptr, log_a_ptr, bias_ptr, da_ptr, db_ptr, parts_ptr,
    chunks_ptr, cu_seqlens_ptr, a_stride, b_stride, da_stride, db_stride,
    N: tl.constexpr, NP: tl.constexpr, WEIGHTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows, inside = _rows(chunks_ptr, cu_seqlens_ptr, CHUNK)
    heads = tl.arange(0, NP)
    keep = inside[:, None] & (heads < N)[None, :]
    at = rows[:, None] * N + heads[None, :]
    dg = tl.load(dg_ptr + at, mask=keep, other=0.0) + tl.load(dg2_ptr + at, mask=keep, other=0.0)
    ddecay = tl.cumsum(dg, axis=0, reverse=True)
    a = tl.load(a_ptr + rows[:, None] * a_stride + heads[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + rows[:, None] * b_stride + heads[None, :], mask=keep, other=0.0).to(tl.float32)
    log_a = tl.load(log_a_ptr + heads, mask=heads < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + heads, mask=heads < N, other=0.0).to(tl.float32)
    rate, shifted = -tl.exp(log_a)[None, :], a + bias[None, :]
    da = ddecay * rate * tl.sigmoid(shifted)
    beta = tl.sigmoid(b)
    db = tl.load(dbeta_ptr + at, mask=keep, other=0.0).to(tl.float32) * beta * (1.0 - beta)
    tl.store(da_ptr + rows[:, None] * da_stride + heads[None, :], da.to(da_ptr.dtype.element_ty), mask=keep)
    tl.store(db_ptr + rows[:, None] * db_stride + heads[None, :], db.to(db_ptr.dtype.element_ty), mask=keep)
    if WEIGHTS:
        part = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * N + heads
        dlog_a = tl.sum(tl.where(keep, ddecay * rate * _softplus(shifted), 0.0), axis=0)
        tl.store(part, dlog_a, mask=heads < N)
        tl.store(part + N, tl.sum(tl.where(keep, da, 0.0), axis=0), mask=heads < N)


def forward(
    a_TN: torch.Tensor, b_TN: torch.Tensor, log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, documents: Documents
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g, β), fp32 [T, N]; a and b within a token."""
    tokens, heads = a_TN.shape
    g, beta = (torch.empty(tokens, heads, dtype=torch.float32, device=a_TN.device) for _ in range(2))
    _forward[(len(documents.chunks),)](
        a_TN, b_TN, log_a_N, dt_bias_N, g, beta, documents.chunks, documents.cu_seqlens, a_TN.stride(0), b_TN.stride(0),
        heads, triton.next_power_of_2(heads), CHUNK,
    )  # fmt: skip
    return g, beta


def backward(
    dg_TN: torch.Tensor, dg2_TN: torch.Tensor, dbeta_TN: torch.Tensor, a_TN: torch.Tensor, b_TN: torch.Tensor,
    log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, documents: Documents, da_TN: torch.Tensor, db_TN: torch.Tensor,
    want_weights: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Write da and db. Gives those of A_log and dt_bias, fp32 [2, N], where wanted. dg comes in two parts, fp32."""
    heads = a_TN.shape[1]
    parts = None
    if want_weights:
        parts = torch.empty(len(documents.chunks), 2, heads, dtype=torch.float32, device=a_TN.device)
    _backward[(len(documents.chunks),)](
        dg_TN, dg2_TN, dbeta_TN, a_TN, b_TN, log_a_N, dt_bias_N, da_TN, db_TN, parts,
        documents.chunks, documents.cu_seqlens, a_TN.stride(0), b_TN.stride(0), da_TN.stride(0), db_TN.stride(0),
        heads, triton.next_power_of_2(heads), want_weights, CHUNK,
    )  # fmt: skip
    return parts.sum(0) if parts is not None else None
