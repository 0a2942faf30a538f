"""One projection with an adapter as an operator with gradients, by the products of the engine's layers (`layer`)."""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import fused
from sparkctl_kernels.lora_linear import reference
from sparkctl_kernels.lora_linear.layer import WideLinear, weight_gradient

# T tokens · K input width · N output width · r rank


def _layer(
    weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> WideLinear:
    joined = torch.cat([weight, (scale * b).to(weight.dtype)], dim=1)
    return WideLinear(joined, a.to(dtype), None if bias is None else bias.to(dtype))


@torch.library.custom_op("sparkctl::lora_linear", mutates_args=())
def _operator(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layer(weight, bias, a, b, scale, x.dtype)
    wide = layer.buffer(len(x))
    wide[:, : layer.width] = x
    y, u = layer.forward(wide)
    assert u is not None
    return y, u


@_operator.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("sparkctl::lora_linear_backward", mutates_args=())
def _gradients(
    dy: torch.Tensor, x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    layer = _layer(weight, None, a, b, scale, x.dtype)
    wide, du = layer.input_gradient(dy)
    assert du is not None
    return wide[:, : layer.width].contiguous(), weight_gradient(du, x), weight_gradient(dy, u, scale)


@_gradients.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    da, db = (x.new_empty(adapter.shape, dtype=torch.float32) for adapter in (a, b))
    return x.new_empty(x.shape), da, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, a, b, ctx.scale = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, a, b)


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, u, weight, a, b = ctx.saved_tensors
    dy = dy.contiguous()
    dx, da, db = _gradients(dy, x, u, weight, a, b, ctx.scale)
    dw = torch.mm(dy.T, x).to(weight.dtype) if ctx.needs_input_grad[1] else None
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias) if ctx.needs_input_grad[2] else None
    return dx, dw, dbias, da.to(a.dtype), db.to(b.dtype), None


_operator.register_autograd(_backward, setup_context=_setup)


def lora_linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, a_rK: torch.Tensor, b_Nr: torch.Tensor,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `reference.lora_linear`: [T, K] → [T, N], with an adapter; gradients for everything."""
    if not fused(x_TK):
        return reference.lora_linear(x_TK, weight_NK, bias_N, a_rK, b_Nr, scale)
    y, _ = _operator(x_TK.contiguous(), weight_NK, bias_N, a_rK, b_Nr, scale)
    return y
