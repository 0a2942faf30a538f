"""The matrix product of this project: below autograd, writing where it is told to, and as an operator with gradients.

Opt-in: training takes cuBLAS unless a measurement on the machine found this one faster, see `gemm`.
"""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.matmul import reference

# M rows · N columns · K summed over


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device` where this operator is asked for."""
    return triton_or_reference("matmul", device)


def forward(
    a_MK: torch.Tensor, b_KN: torch.Tensor, c_MN: torch.Tensor, scale: float = 1.0, *, add: bool = False
) -> None:
    """Write scale · a·b into c, or add it; c may be part of a wider buffer, a and b may be transposed views.

    fp32 operands are torch's on a GPU: their tiles would want twice the shared memory.
    """
    if not fused(a_MK) or (a_MK.is_cuda and a_MK.dtype == torch.float32):
        c_MN.copy_(reference.matmul(a_MK, b_KN, c_MN if add else None, scale))
        return
    from sparkctl_kernels.matmul import kernel

    kernel.matmul(a_MK, b_KN, c_MN, scale, add)


@torch.library.custom_op("sparkctl::matmul", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = a.new_empty(a.shape[0], b.shape[1])
    forward(a, b, c)
    return c


@_operator.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dc: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    want_a, want_b = ctx.needs_input_grad
    return _operator(dc, b.T) if want_a else None, _operator(a.T, dc) if want_b else None


_operator.register_autograd(_backward, setup_context=_setup)


def matmul(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """See `reference.matmul`: [M, K] · [K, N] → [M, N]; any strides."""
    if not fused(a_MK):
        return reference.matmul(a_MK, b_KN)
    return _operator(a_MK, b_KN)
