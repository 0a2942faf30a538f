"""Norm and rotation of queries and keys: Triton on a GPU, the reference elsewhere; as functions and as an operator."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.qk_norm_rope import reference
from sparkctl_kernels.strides import lines
from sparkctl_kernels.vjp import Tape

# T tokens · N query heads · K kv heads · H head dim · h half of the rotated dims
Pair = tuple[torch.Tensor, torch.Tensor]


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("qk_norm_rope", device)


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None,
    cos_Th: torch.Tensor, sin_Th: torch.Tensor, eps: float, offset: float,
) -> Pair:  # fmt: skip
    """See `reference.qk_norm_rope`; q and k may be views into the projection's output."""
    if not fused(q_TNH):
        return reference.qk_norm_rope(q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, eps, offset)
    from sparkctl_kernels.qk_norm_rope import kernel

    return kernel.forward(q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, eps, offset)


def backward(
    dq_TNH: torch.Tensor, dk_TKH: torch.Tensor, q_TNH: torch.Tensor, k_TKH: torch.Tensor,
    q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None, cos_Th: torch.Tensor, sin_Th: torch.Tensor,
    eps: float, offset: float, dxq_TNH: torch.Tensor, dxk_TKH: torch.Tensor, want_weights: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """Write the gradients of q and k into views like them. Gives those of the weights, fp32 [2, H], where wanted."""
    if not fused(dq_TNH):
        weights = () if q_weight_H is None or k_weight_H is None else (q_weight_H, k_weight_H)

        def call(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Pair:
            q_weight, k_weight = weights or (None, None)
            return reference.qk_norm_rope(q, k, q_weight, k_weight, cos_Th, sin_Th, eps, offset)

        dxq, dxk, *dw = Tape(call, (q_TNH, k_TKH, *weights)).gradients(dq_TNH, dk_TKH)
        dxq_TNH.copy_(dxq)
        dxk_TKH.copy_(dxk)
        return torch.stack(dw).float() if want_weights else None
    from sparkctl_kernels.qk_norm_rope import kernel

    return kernel.backward(
        dq_TNH.contiguous(), dk_TKH.contiguous(), q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, eps, offset,
        dxq_TNH, dxk_TKH, want_weights,
    )  # fmt: skip


@torch.library.custom_op("sparkctl::qk_norm_rope", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return forward(q, k, q_weight, k_weight, cos, sin, eps, offset)


@_operator.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("sparkctl::qk_norm_rope_backward", mutates_args=())
def _gradients(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: float, want: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dxq, dxk = q.new_empty(q.shape), k.new_empty(k.shape)
    dw = backward(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, dxq, dxk, want)
    return dxq, dxk, dw if dw is not None else q.new_empty(0, dtype=torch.float32)


@_gradients.register_fake
def _(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float, offset: float, want: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dw = q.new_empty((2, q.shape[2]) if want else 0, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *tensors, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    want = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dxq, dxk, dw = _gradients(dq, dk, q, k, q_weight, k_weight, cos, sin, ctx.eps, ctx.offset, want)
    weights = (dw[0].to(q_weight.dtype), dw[1].to(k_weight.dtype)) if want else (None, None)
    return dxq, dxk, *weights, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def qk_norm_rope(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, q_weight_H: torch.Tensor | None, k_weight_H: torch.Tensor | None,
    cos_Th: torch.Tensor, sin_Th: torch.Tensor, eps: float, offset: float,
) -> Pair:  # fmt: skip
    """See `reference.qk_norm_rope`. cos and sin are [T, R/2] in fp32, of positions that restart in each document."""
    if not fused(q_TNH):
        return reference.qk_norm_rope(q_TNH, k_TKH, q_weight_H, k_weight_H, cos_Th, sin_Th, eps, offset)
    weights = (w if w is None else w.contiguous() for w in (q_weight_H, k_weight_H))
    return _operator(lines(q_TNH), lines(k_TKH), *weights, cos_Th.contiguous(), sin_Th.contiguous(), eps, offset)
