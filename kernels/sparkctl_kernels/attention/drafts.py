"""Attention of a draft: to the first draft step's keys at or before its row, and to those of its own row.

What a server's cache holds when the MTP head drafts its j-th token after row i: the keys that the head made of rows up
to i from the model's own states, then one for each draft since. Attention to the former gives O₁ and its log-sum-exp
L₁, a kernel makes O and L of the whole from them; and the former's backward is attention's own, given L and O of the
whole: P and dS of its blocks follow from these two alone.

T tokens · M rows that draft · N query heads · K kv heads · H head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparkctl_kernels.attention import op, reference
from sparkctl_kernels.attention.reference import Pair
from sparkctl_kernels.documents import Documents
from sparkctl_kernels.vjp import Tape


def draft_attention(
    q_MNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, own: Sequence[Pair], packed: Documents,
    rows_M: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See `reference.draft_attention`: [M, N, H], H a power of two up to 256; gradients for everything.

    rows: where in the pack the queries and their own keys stand, int64, each once; without them every row has one. With
    nothing of a row's own it is `attention`, which keeps its output for backward instead of computing it again.
    """
    if op.computes(q_MNH):
        flat = [x for pair in own for x in pair]
        return _DraftAttention.apply(q_MNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous(), packed, rows_M, *flat)
    q_TNH, own_T = q_MNH, list(own)
    if rows_M is not None:
        q_TNH = _placed(q_MNH, rows_M, len(k_TKH))
        own_T = [(_placed(k, rows_M, len(k_TKH)), _placed(v, rows_M, len(k_TKH))) for k, v in own]
    if own:
        out_TNH = reference.draft_attention(q_TNH, k_TKH, v_TKH, own_T, packed.lengths)
    else:
        out_TNH = reference.attention(q_TNH, k_TKH, v_TKH, packed.lengths)
    return out_TNH if rows_M is None else out_TNH.index_select(0, rows_M)


class _DraftAttention(torch.autograd.Function):
    """Rows without a query of their own get a zero: attention to it costs its time, and gives no gradient.

    No torch.library operator: that takes 159 µs of host time a call with its backward instead of 35.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Documents, rows: torch.Tensor | None,
        *own: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        whole, kept = op.forward(q if rows is None else _placed(q, rows, len(k)), k, v, packed)
        assert not isinstance(kept, Tape)
        ctx.packed, ctx.rows, ctx.kind = packed, rows, type(kept)
        mine: tuple[torch.Tensor, ...] = ()
        out, log_sum = whole, kept.log_sum_NT
        if rows is not None:
            out, log_sum = out.index_select(0, rows), log_sum.index_select(1, rows)
        if own:
            from sparkctl_kernels.attention import kernel

            keys, values = torch.stack(own[::2]), torch.stack(own[1::2])
            out, log_sum = kernel.own(q, keys, values, out.contiguous(), log_sum.contiguous(), kept.unit)
            if rows is None:
                kept = kept._replace(o_TNH=out, log_sum_NT=log_sum)
            else:
                kept.o_TNH.index_copy_(0, rows, out)
                kept.log_sum_NT.index_copy_(1, rows, log_sum)
            mine = (q, keys, values, out, log_sum)
        ctx.own = len(mine)
        ctx.save_for_backward(*mine, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own, saved, rows = ctx.saved_tensors[: ctx.own], ctx.kind(*ctx.saved_tensors[ctx.own :]), ctx.rows
        dv, do = torch.empty_like(saved.v_TKH), do.contiguous()
        dq, dk = op.backward(do if rows is None else _placed(do, rows, len(dv)), saved, ctx.packed, None, dv)
        dq = dq.contiguous() if rows is None else dq.index_select(0, rows)
        if not own:
            return dq, dk, dv, None, None
        from sparkctl_kernels.attention import kernel

        q, keys, values, out, log_sum = own
        dkeys, dvalues = kernel.own_backward_(dq, do, q, keys, values, out, log_sum, saved.unit)
        return dq, dk, dv, None, None, *(x for pair in zip(dkeys, dvalues, strict=True) for x in pair)


def _placed(x_M: torch.Tensor, rows_M: torch.Tensor, tokens: int) -> torch.Tensor:
    """[T, …] with x at its rows, zero elsewhere."""
    return x_M.new_zeros(tokens, *x_M.shape[1:]).index_copy_(0, rows_M, x_M)
