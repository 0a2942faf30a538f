"""SiLU(gate) · up: Triton on a GPU, the reference elsewhere; as functions that write in place, and as an operator."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.silu_mul import reference
from sparkctl_kernels.vjp import Tape

# T tokens · F width of the feed-forward layer


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("silu_mul", device)


def forward(gate_up_T2F: torch.Tensor, y_TF: torch.Tensor) -> None:
    """Write the product into y, whose rows may be part of a wider buffer."""
    if not fused(gate_up_T2F):
        y_TF.copy_(reference.silu_mul(gate_up_T2F))
        return
    from sparkctl_kernels.silu_mul import kernel

    kernel.forward(gate_up_T2F, y_TF)


def backward_(dy_TF: torch.Tensor, gate_up_T2F: torch.Tensor) -> None:
    """Replace gate_up by its gradient, and dy by what forward wrote."""
    if not fused(dy_TF):
        tape = Tape(reference.silu_mul, (gate_up_T2F,))
        gate_up_T2F.copy_(tape.gradients(dy_TF)[0])
        dy_TF.copy_(tape.outputs[0])
        return
    from sparkctl_kernels.silu_mul import kernel

    kernel.backward_(dy_TF, gate_up_T2F)


@torch.library.custom_op("sparkctl::silu_mul", mutates_args=())
def _operator(gate_up: torch.Tensor) -> torch.Tensor:
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    forward(gate_up, y)
    return y


@_operator.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("sparkctl::silu_mul_backward", mutates_args=())
def _gradients(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    d = gate_up.clone()
    backward_(dy.clone(memory_format=torch.contiguous_format), d)
    return d


@_gradients.register_fake
def _(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate_up)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    return _gradients(dy, *ctx.saved_tensors)


_operator.register_autograd(_backward, setup_context=_setup)


def silu_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`: [T, 2F] → [T, F]."""
    if not fused(gate_up_T2F):
        return reference.silu_mul(gate_up_T2F)
    return _operator(gate_up_T2F.contiguous())
