"""Attention within documents: on a GPU this project's kernels or torch's FlashAttention-2, the faster; on a CPU the
reference.

As functions below autograd, and as an operator with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from sparkctl_kernels.attention import flash, reference
from sparkctl_kernels.attention.kept import FlashKept, TritonKept
from sparkctl_kernels.dispatch import Choice, fused
from sparkctl_kernels.documents import Documents, documents
from sparkctl_kernels.vjp import Tape

# T tokens · N query heads · K kv heads · H head dim
Saved = Tape | FlashKept | TritonKept

_asked: str | None = None


@contextmanager
def by(kernel: Literal["flash", "triton"]) -> Iterator[None]:
    """Take this one in the block where the device has both, to compare them."""
    global _asked
    _asked = kernel
    try:
        yield
    finally:
        _asked = None


def choice(device: torch.device, head_dim: int) -> Choice:
    """Which kernel runs on `device`."""
    if device.type != "cuda":
        return Choice("attention", "reference", f"plain torch on {device.type}")
    if _takes_flash(device, head_dim):
        return Choice("attention", "flash", f"FlashAttention-2 of torch, head dim {head_dim}")
    return Choice("attention", "triton", f"fused kernel of this project, head dim {head_dim}")


def _takes_flash(device: torch.device, head_dim: int) -> bool:
    if not flash.serves(device, head_dim):
        return False
    if _asked is not None:
        return _asked == "flash"
    from sparkctl_kernels.attention import kernel

    return not kernel.in_wide_tiles(device, head_dim)


def computes(q_TNH: torch.Tensor) -> bool:
    """Whether a kernel takes these queries.

    In fp32, which proofs alone compute in, a GPU has the reference: tensor cores cut fp32 operands to TF32, and that
    alone put gradients of a deep model up to 1.8 % beside the truth.
    """
    return fused(q_TNH) and not (q_TNH.is_cuda and q_TNH.dtype == torch.float32)


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, packed: Documents, window: int | None = None
) -> tuple[torch.Tensor, Saved]:
    """(o [T, N, H], what `backward` wants). v may be a view into the projection's output."""
    window = None if window is None or window >= packed.longest else window
    if not computes(q_TNH):
        tape = Tape(lambda q, k, v: reference.attention(q, k, v, packed.lengths, window), (q_TNH, k_TKH, v_TKH))
        return tape.outputs[0], tape
    if _takes_flash(q_TNH.device, q_TNH.shape[2]):
        return flash.forward(q_TNH, k_TKH, v_TKH, packed, window)
    from sparkctl_kernels.attention import kernel

    return kernel.forward(q_TNH, k_TKH, v_TKH, packed, window)


def backward(
    do_TNH: torch.Tensor, saved: Saved, packed: Documents, window: int | None, dv_TKH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk); writes dv, which may be a view into the projection's gradient."""
    window = None if window is None or window >= packed.longest else window
    if isinstance(saved, Tape):
        dq, dk, dv = saved.gradients(do_TNH)
        dv_TKH.copy_(dv)
        return dq, dk
    if isinstance(saved, FlashKept):
        return flash.backward(do_TNH, saved, packed, window, dv_TKH)
    from sparkctl_kernels.attention import kernel

    return kernel.backward(do_TNH, saved, packed, window, dv_TKH)


@torch.library.custom_op("sparkctl::attention", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    return forward(q, k, v, documents(lengths, q.device), window)[0].contiguous()


@_operator.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None) -> torch.Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("sparkctl::attention_backward", mutates_args=())
def _gradients(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed, dv = documents(lengths, q.device), torch.empty_like(v)
    _, saved = forward(q, k, v, packed, window)
    dq, dk = backward(do.contiguous(), saved, packed, window, dv)
    return dq.contiguous(), dk.contiguous(), dv


@_gradients.register_fake
def _(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, v, ctx.lengths, ctx.window = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
    dq, dk, dv = _gradients(do, *ctx.saved_tensors, ctx.lengths, ctx.window)
    return dq, dk, dv, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, packed: Documents, window: int | None = None
) -> torch.Tensor:
    """See `reference.attention`: [T, N, H], H a power of two up to 256. Its backward computes the forward again."""
    if not computes(q_TNH):
        return reference.attention(q_TNH, k_TKH, v_TKH, packed.lengths, window)
    return _operator(q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous(), list(packed.lengths), window)
