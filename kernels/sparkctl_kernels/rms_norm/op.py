"""RMSNorm: Triton on a GPU, the reference elsewhere; as functions that write in place, and as an autograd operator."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.rms_norm import reference
from sparkctl_kernels.vjp import Tape

# T tokens · D width of a row


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("rms_norm", device)


def forward(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, offset: float,
    y_TD: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Write the norm of s = x + residual into y, whose rows may be part of a wider buffer. Gives s; x where alone."""
    if not fused(x_TD):
        if residual_TD is None:
            y_TD.copy_(reference.rms_norm(x_TD, weight_D, eps, offset, y_TD.dtype))
            return x_TD
        y, s = reference.add_rms_norm(x_TD, residual_TD, weight_D, eps, offset, y_TD.dtype)
        y_TD.copy_(y)
        return s
    from sparkctl_kernels.rms_norm import kernel

    s_TD = x_TD if residual_TD is None else torch.empty_like(residual_TD)
    kernel.forward(x_TD, residual_TD, weight_D, eps, offset, y_TD, s_TD)
    return s_TD


def backward_(
    dy_TD: torch.Tensor, s_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, d_TD: torch.Tensor,
    *, add: bool = True, low_TD: torch.Tensor | None = None, remake: bool = True, want_weight: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """Replace d, the gradient that reaches s past the norm, by the whole gradient of s. Gives dw (fp32) where wanted.

    add: d holds something. low: takes a copy of the result in its own dtype. remake: dy becomes y again.
    """
    if not fused(dy_TD):
        tape = Tape(lambda s, w: reference.rms_norm(s, w, eps, offset, dy_TD.dtype), (s_TD, weight_D))
        ds, dw = tape.gradients(dy_TD)
        d_TD.copy_(ds + d_TD if add else ds)
        if low_TD is not None:
            low_TD.copy_(d_TD)
        if remake:
            dy_TD.copy_(tape.outputs[0])
        return dw.float() if want_weight else None
    from sparkctl_kernels.rms_norm import kernel

    return kernel.backward(
        dy_TD, s_TD, weight_D, eps, offset, d_TD, add=add, low_TD=low_TD, remake=remake, want_weight=want_weight
    )


@torch.library.custom_op("sparkctl::add_rms_norm", mutates_args=())
def _operator(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x)
    s = forward(x, residual, weight, eps, offset, y)
    return y, s if residual is not None else x.new_empty(0)


@_operator.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(residual) if residual is not None else x.new_empty(0)


@torch.library.custom_op("sparkctl::add_rms_norm_backward", mutates_args=())
def _gradients(
    dy: torch.Tensor, d: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor, eps: float, offset: float,
    want: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    ds = torch.empty_like(s) if d is None else d.clone(memory_format=torch.contiguous_format)
    dy = dy.contiguous()
    dw = backward_(dy, s, weight, eps, offset, ds, add=d is not None, remake=False, want_weight=want)
    return ds, dw if dw is not None else s.new_empty(0, dtype=torch.float32)


@_gradients.register_fake
def _(
    dy: torch.Tensor, d: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor, eps: float, offset: float,
    want: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(s), s.new_empty(s.shape[-1] if want else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, residual, weight, ctx.eps, ctx.offset = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _backward(ctx: Any, dy: torch.Tensor, d: torch.Tensor) -> tuple[Any, ...]:
    s, weight = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    want = ctx.needs_input_grad[2]
    ds, dw = _gradients(dy, None if residual_dtype is None else d, s, weight, ctx.eps, ctx.offset, want)
    dr = None if residual_dtype is None else ds
    return ds.to(x_dtype), dr, dw.to(weight.dtype) if want else None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """See `reference.rms_norm`. x [T, D], weight [D]; gradients for both."""
    if not fused(x_TD):
        return reference.rms_norm(x_TD, weight_D, eps, offset)
    y, _ = _operator(x_TD.contiguous(), None, weight_D.contiguous(), eps, offset)
    return y


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`: the norm of the sum, and the sum itself."""
    if not fused(x_TD):
        return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps, offset)
    y, s = _operator(x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous(), eps, offset)
    return y, s
