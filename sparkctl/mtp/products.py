"""The head's matrix products under autograd: bf16 operands, and gradients of the weights that add up in fp32.

A weight's gradient goes straight into its `.grad`, by the GEMM that computes it: a head that runs over several draft
steps would else write a gradient a step and add them afterwards, 2.9 GB more to move for three steps of the 2B. Each
backward runs once, since it writes over what was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from sparkctl_kernels.gemm import product
from sparkctl_kernels.lora_linear.layer import Together
from sparkctl_kernels.silu_mul import op as silu_mul
from torch import nn

# T tokens · D width of the input · M widths of the outputs side by side · F FFN

Tensor = torch.Tensor


class Product:
    """x·Wᵀ for weights (fp32 masters) that share their input, as one GEMM on their rounded copies side by side."""

    def __init__(self, weights: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.weights, self.rows = list(weights), [len(weight) for weight in weights]
        first = self.weights[0]
        self.copy = torch.empty(sum(self.rows), first.shape[1], dtype=dtype, device=first.device)
        ends = list(accumulate(self.rows))
        self._slices = [slice(end - count, end) for end, count in zip(ends, self.rows, strict=True)]
        self._gradients = Together()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters."""
        for part, weight in zip(self.copy.split(self.rows), self.weights, strict=True):
            part.copy_(weight)

    def add_gradient(self, dy_TM: Tensor, x_TD: Tensor) -> None:
        """Add dyᵀ·x to the masters' `.grad`."""
        self._gradients.add(dy_TM, x_TD, self.weights, self._slices)

    def __call__(self, x_TD: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x_TD, self)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, by: Product) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(x_TD)
        return product(x_TD, by.copy.T)

    @staticmethod
    def backward(ctx: Any, dy_TM: Tensor) -> tuple[Tensor, None]:
        (x_TD,) = ctx.saved_tensors
        ctx.by.add_gradient(dy_TM, x_TD)
        return product(dy_TM, ctx.by.copy), None


def feed_forward(x_TD: Tensor, gate_up: Product, down: Product) -> Tensor:
    """down(SiLU(gate) · up), [T, D]. What lies between is not kept: its backward makes it again, in place."""
    out: Tensor = _FeedForward.apply(x_TD, gate_up, down)
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_up: Product, down: Product) -> Tensor:
        gates_T2F = product(x_TD, gate_up.copy.T)
        y_TF = gates_T2F.new_empty(len(x_TD), down.copy.shape[1])
        silu_mul.forward(gates_T2F, y_TF)
        ctx.gate_up, ctx.down = gate_up, down
        ctx.save_for_backward(x_TD, gates_T2F)
        return product(y_TF, down.copy.T)

    @staticmethod
    def backward(ctx: Any, d_TD: Tensor) -> tuple[Tensor, None, None]:
        x_TD, gates_T2F = ctx.saved_tensors
        y_TF = product(d_TD, ctx.down.copy)
        silu_mul.backward_(y_TF, gates_T2F)  # the gates are their own gradient now, y what down was given
        ctx.down.add_gradient(d_TD, y_TF)
        ctx.gate_up.add_gradient(gates_T2F, x_TD)
        return product(gates_T2F, ctx.gate_up.copy), None, None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Those rows of x; `rows` names each once, so that a gradient is copied to its place."""
    out: Tensor = _Take.apply(x, rows)
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d.new_zeros(ctx.shape).index_copy_(0, ctx.rows, d), None


def heads(y_TM: Tensor, widths: Sequence[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and gates [T, N, H], keys and values [T, K, H] of a projection to `widths`: a head's query, its gate."""
    q, gate, k, v = _Heads.apply(y_TM, list(widths), head_dim)
    return q, gate, k, v


class _Heads(torch.autograd.Function):
    """Their gradients are written side by side; autograd would fill and add a tensor for each of the views."""

    @staticmethod
    def forward(ctx: Any, y_TM: Tensor, widths: list[int], head_dim: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.widths, ctx.head_dim = y_TM.shape, widths, head_dim
        return _views(y_TM, widths, head_dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        dy_TM = gradients[0].new_empty(ctx.shape)
        for part, gradient in zip(_views(dy_TM, ctx.widths, ctx.head_dim), gradients, strict=True):
            part.copy_(gradient)
        return dy_TM, None, None


def _views(y_TM: Tensor, widths: list[int], head_dim: int) -> tuple[Tensor, ...]:
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in y_TM.split(widths, dim=1))
    return q[:, ::2], q[:, 1::2], k, v
