"""The short causal convolution: Triton on a GPU, the reference elsewhere; as functions in place and as an operator."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.causal_conv import reference
from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.strides import lines
from sparkctl_kernels.vjp import Tape

# T tokens · C channels · W taps · K key heads · N value heads · D key dim · V value width
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("causal_conv", device)


def forward(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, positions_T: torch.Tensor, key_heads: int, key_dim: int
) -> Triple:
    """See `reference.causal_conv`; x may be part of a wider buffer. Results contiguous on a GPU."""
    if not fused(x_TC):
        return reference.causal_conv(x_TC, weight_CW, positions_T, key_heads, key_dim)
    from sparkctl_kernels.causal_conv import kernel

    return kernel.forward(x_TC, weight_CW, positions_T, key_heads, key_dim)


def backward(
    dq_TND: torch.Tensor, dk_TND: torch.Tensor, dv_TV: torch.Tensor, x_TC: torch.Tensor, weight_CW: torch.Tensor,
    positions_T: torch.Tensor, key_heads: int, dx_TC: torch.Tensor, dk2_TND: torch.Tensor | None = None,
    want_weight: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """Write dx, which may be part of a wider buffer; gives dw (fp32) where wanted.

    dq and dk come for N = K or, as the delta rule leaves them, for more value heads, several of which share a key head.
    dk2: a second part of dk.
    """
    if not fused(dq_TND):
        key_dim = dq_TND.shape[2]
        dk = dk_TND if dk2_TND is None else dk_TND + dk2_TND
        dq, dk = (x.unflatten(1, (key_heads, -1)).sum(2) for x in (dq_TND, dk))
        call = lambda x, w: reference.causal_conv(x, w, positions_T, key_heads, key_dim)  # noqa: E731
        dx, dw = Tape(call, (x_TC, weight_CW)).gradients(dq, dk, dv_TV)
        dx_TC.copy_(dx)
        return dw.float() if want_weight else None
    from sparkctl_kernels.causal_conv import kernel

    return kernel.backward(dq_TND, dk_TND, dv_TV, dk2_TND, x_TC, weight_CW, positions_T, key_heads, dx_TC, want_weight)


@torch.library.custom_op("sparkctl::causal_conv", mutates_args=())
def _operator(
    x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, key_heads: int, key_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = forward(x, weight, positions, key_heads, key_dim)
    return q.contiguous(), k.contiguous(), v.contiguous()


@_operator.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, key_heads: int, key_dim: int) -> Triple:
    q = x.new_empty(x.shape[0], key_heads, key_dim)
    return q, torch.empty_like(q), x.new_empty(x.shape[0], x.shape[1] - 2 * key_heads * key_dim)


@torch.library.custom_op("sparkctl::causal_conv_backward", mutates_args=())
def _gradients(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    positions: torch.Tensor, want: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    dw = backward(dq, dk, dv, x, weight, positions, dq.shape[1], dx, want_weight=want)
    return dx, dw if dw is not None else x.new_empty(0, dtype=torch.float32)


@_gradients.register_fake
def _(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    positions: torch.Tensor, want: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(weight.shape if want else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    x, weight, positions, *_ = inputs
    ctx.save_for_backward(x, weight, positions)


def _backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[Any, ...]:
    x, weight, positions = ctx.saved_tensors
    want = ctx.needs_input_grad[1]
    dx, dw = _gradients(dq, dk, dv, x, weight, positions, want)
    return dx, dw.to(weight.dtype) if want else None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def causal_conv(
    x_TC: torch.Tensor, weight_CW: torch.Tensor, positions_T: torch.Tensor, key_heads: int, key_dim: int
) -> Triple:
    """See `reference.causal_conv`: (q [T, K, D], k, v [T, V]), contiguous; positions int32, D a power of two."""
    if not fused(x_TC):
        return reference.causal_conv(x_TC, weight_CW, positions_T, key_heads, key_dim)
    return _operator(lines(x_TC), weight_CW.contiguous(), positions_T.contiguous(), key_heads, key_dim)
