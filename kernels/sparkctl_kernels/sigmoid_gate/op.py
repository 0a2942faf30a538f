"""x · σ(gate): Triton on a GPU, the reference elsewhere; as functions that write in place, and as an operator."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.sigmoid_gate import reference
from sparkctl_kernels.strides import lines
from sparkctl_kernels.vjp import Tape

# T tokens · N heads · H head dim · M = N · H


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("sigmoid_gate", device)


def forward(x_TNH: torch.Tensor, gate_TNH: torch.Tensor, y_TM: torch.Tensor) -> None:
    """Write the product into y; the gate may be a view with strides, y part of a wider buffer."""
    if not fused(x_TNH):
        y_TM.copy_(reference.sigmoid_gate(x_TNH, gate_TNH).flatten(1))
        return
    from sparkctl_kernels.sigmoid_gate import kernel

    kernel.forward(x_TNH, gate_TNH, y_TM)


def backward_(
    dy_TM: torch.Tensor, x_TNH: torch.Tensor, gate_TNH: torch.Tensor, dgate_TNH: torch.Tensor
) -> torch.Tensor:
    """Give dx, write dgate (a view like the gate), and replace dy by what forward wrote."""
    if not fused(dy_TM):
        tape = Tape(reference.sigmoid_gate, (x_TNH, gate_TNH))
        dx, dgate = tape.gradients(dy_TM.reshape(x_TNH.shape))
        dgate_TNH.copy_(dgate)
        dy_TM.copy_(tape.outputs[0].flatten(1))
        return dx
    from sparkctl_kernels.sigmoid_gate import kernel

    dx_TNH = torch.empty_like(x_TNH)
    kernel.backward_(dy_TM, x_TNH, gate_TNH, dx_TNH, dgate_TNH)
    return dx_TNH


@torch.library.custom_op("sparkctl::sigmoid_gate", mutates_args=())
def _operator(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    forward(x, gate, y.flatten(1))
    return y


@_operator.register_fake
def _(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparkctl::sigmoid_gate_backward", mutates_args=())
def _gradients(dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dx = backward_(dy.clone(memory_format=torch.contiguous_format).flatten(1), x, gate, dgate)
    return dx, dgate


@_gradients.register_fake
def _(dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(gate, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _gradients(dy, *ctx.saved_tensors)


_operator.register_autograd(_backward, setup_context=_setup)


def sigmoid_gate(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
    """See `reference.sigmoid_gate`; the gate may be a view with strides: [T, N, H]."""
    if not fused(x_TNH):
        return reference.sigmoid_gate(x_TNH, gate_TNH)
    return _operator(x_TNH.contiguous(), lines(gate_TNH))
