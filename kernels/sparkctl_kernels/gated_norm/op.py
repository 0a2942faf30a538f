"""GatedDeltaNet's output norm: Triton on a GPU, the reference elsewhere; as functions in place and as an operator."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.gated_norm import reference
from sparkctl_kernels.vjp import Tape

# T tokens · N value heads · E value head dim · M = N · E


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("gated_norm", device)


def forward(x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float, y_TM: torch.Tensor) -> None:
    """Write the norm into y; z and y may be parts of wider buffers."""
    if not fused(x_TNE):
        y_TM.copy_(reference.gated_norm(x_TNE, z_TNE, weight_E, eps).flatten(1))
        return
    from sparkctl_kernels.gated_norm import kernel

    kernel.forward(x_TNE, z_TNE, weight_E, eps, y_TM)


def backward_(
    dy_TM: torch.Tensor, x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float,
    dz_TNE: torch.Tensor, want_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dx, dw in fp32 where wanted); writes dz, which may be part of a wider buffer, and what forward wrote over dy."""
    if not fused(dy_TM):
        tape = Tape(partial(reference.gated_norm, eps=eps), (x_TNE, z_TNE, weight_E))
        dx, dz, dw = tape.gradients(dy_TM.reshape(x_TNE.shape))
        dz_TNE.copy_(dz)
        dy_TM.copy_(tape.outputs[0].flatten(1))
        return dx, dw.float() if want_weight else None
    from sparkctl_kernels.gated_norm import kernel

    dx_TNE = torch.empty_like(x_TNE)
    return dx_TNE, kernel.backward_(dy_TM, x_TNE, z_TNE, weight_E, eps, dx_TNE, dz_TNE, want_weight)


@torch.library.custom_op("sparkctl::gated_norm", mutates_args=())
def _operator(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = torch.empty_like(x)
    forward(x, z, weight, eps, y.flatten(1))
    return y


@_operator.register_fake
def _(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparkctl::gated_norm_backward", mutates_args=())
def _gradients(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, want: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    dy = dy.clone(memory_format=torch.contiguous_format).flatten(1)
    dx, dw = backward_(dy, x, z, weight, eps, dz, want)
    return dx, dz, dw if dw is not None else x.new_empty(0, dtype=torch.float32)


@_gradients.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, want: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return torch.empty_like(x), dz, x.new_empty(x.shape[-1] if want else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, z, weight, ctx.eps = inputs
    ctx.save_for_backward(x, z, weight)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, z, weight = ctx.saved_tensors
    want = ctx.needs_input_grad[2]
    dx, dz, dw = _gradients(dy, x, z, weight, ctx.eps, want)
    return dx, dz, dw.to(weight.dtype) if want else None, None


_operator.register_autograd(_backward, setup_context=_setup)


def gated_norm(x_TNE: torch.Tensor, z_TNE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.gated_norm`: [T, N, E], E a power of two; z may be a view with strides between tokens."""
    if not fused(x_TNE):
        return reference.gated_norm(x_TNE, z_TNE, weight_E, eps)
    if z_TNE.stride()[1:] != (z_TNE.shape[2], 1):
        z_TNE = z_TNE.contiguous()
    return _operator(x_TNE.contiguous(), z_TNE, weight_E.contiguous(), eps)
