"""Causal attention within documents, in plain torch, a document at a time; also with keys that a row has to itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# T tokens · N query heads · K kv heads · H head dim · L tokens of one document · M queries of a block

Pair = tuple[torch.Tensor, torch.Tensor]
BLOCK = 256  # queries whose scores are there at a time


def attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, lengths: Sequence[int], window: int | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ / √H)·v over the keys at or before each query in its own document: [T, N, H].

    `lengths` are the documents' in their order. With `window` a query sees that many keys, itself among them.
    """
    group, sizes = q_TNH.shape[1] // k_TKH.shape[1], list(lengths)
    outputs = []
    for q, k, v in zip(q_TNH.split(sizes), k_TKH.split(sizes), v_TKH.split(sizes), strict=True):
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if window is None or window >= q.shape[1]:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        else:
            out = _windowed(q, k, v, window)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _windowed(q_NLH: torch.Tensor, k_NLH: torch.Tensor, v_NLH: torch.Tensor, window: int) -> torch.Tensor:
    """As many queries at a time as a window has keys, so that no mask is larger than window x 2 window."""
    outputs = []
    for first in range(0, q_NLH.shape[1], window):
        low, q = max(0, first - window + 1), q_NLH[:, first : first + window]
        k, v = (x[:, low : first + q.shape[1]] for x in (k_NLH, v_NLH))
        rows = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        behind = rows - torch.arange(low, low + k.shape[1], device=q.device)[None]
        mask = (behind >= 0) & (behind < window)
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0])
    return torch.cat(outputs, dim=1)


def draft_attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, own: Sequence[Pair], lengths: Sequence[int]
) -> torch.Tensor:
    """Causal attention within documents in which each row has keys and values of its own besides: [T, N, H].

    own: pairs (k [T, K, H], v [T, K, H]); of each pair a query sees its own row alone. Softmax in fp32.
    """
    group, sizes = q_TNH.shape[1] // k_TKH.shape[1], list(lengths)
    outputs, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        k, v = (x[rows].repeat_interleave(group, 1) for x in (k_TKH, v_TKH))
        for first in range(start, start + size, BLOCK):
            some = slice(first, min(first + BLOCK, start + size))
            mine = [tuple(x[some].repeat_interleave(group, 1) for x in pair) for pair in own]
            seen = some.stop - start
            outputs.append(_with_own(q_TNH[some], k[:seen], v[:seen], mine, first - start))
        start += size
    return torch.cat(outputs)


def _with_own(
    q_MNH: torch.Tensor, k_LNH: torch.Tensor, v_LNH: torch.Tensor, own: Sequence[tuple[torch.Tensor, ...]], first: int
) -> torch.Tensor:
    """Queries of the rows from `first` of a document on, over its keys so far and their own."""
    scale = q_MNH.shape[-1] ** -0.5
    scores_NML = torch.einsum("mnh,lnh->nml", q_MNH.float(), k_LNH.float()) * scale
    rows = first + torch.arange(q_MNH.shape[0], device=q_MNH.device)
    later = torch.arange(k_LNH.shape[0], device=q_MNH.device)[None] > rows[:, None]
    extra = [(q_MNH.float() * k.float()).sum(-1).T[..., None] * scale for k, _ in own]
    p_NML = torch.cat([scores_NML.masked_fill(later, float("-inf")), *extra], dim=-1).softmax(-1)
    past = p_NML[..., : k_LNH.shape[0]]
    out = torch.einsum("nml,lnh->mnh", past, v_LNH.float())
    for number, (_, v) in enumerate(own):
        out = out + p_NML[..., k_LNH.shape[0] + number].T[..., None] * v.float()
    return out.to(q_MNH.dtype)
