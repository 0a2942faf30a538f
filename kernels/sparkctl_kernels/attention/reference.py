"""Causal attention within documents, in plain torch, a document at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# T tokens · N query heads · K kv heads · H head dim · L tokens of one document


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
