"""The operators that mix tokens, each alone: attention, convolution, recurrence, with boundaries and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparkctl.hardware.shape import head_dim
from sparkctl.model.served import unfit
from sparkctl.verify.leaks import LENGTHS, Finding, Tensors, difference
from sparkctl.verify.small import SLOW, has_rule, parts_of, whole_config, windows

if TYPE_CHECKING:
    import torch
    from sparkctl_kernels.documents import Documents

# T tokens · N query or value heads · K kv or key heads · H head dim · D key dim · E value dim · C channels
SUBJECT, WINDOWED = "operator", "windowed attention"
Call = Callable[..., Any]


def operator_leaks(config: dict[str, Any], device: torch.device) -> list[Finding]:
    """Each operator that this architecture has, in bf16, at its head sizes; attention in each form that it uses."""
    real = whole_config(config)
    text = real.to_dict()
    if device.type == "cuda" and (what := unfit(text)):
        return [Finding(SUBJECT, part, refused=f"there is nothing for {what}") for part in parts_of(config)[:3]]
    heads = head_dim(text)
    found = [
        _finding("attention" if window is None else WINDOWED, *_attention(heads, window), device)
        for window in windows(real)
    ]
    if has_rule(real):
        sizes = real.linear_key_head_dim, real.linear_value_head_dim
        found.append(_finding("convolution", *_convolution(*sizes, real.linear_conv_kernel_dim), device))
        found.append(_finding("recurrence", *_recurrence(*sizes), device))
    return found


def _attention(head_dim: int, window: int | None) -> tuple[list[tuple[int, ...]], Call]:
    from sparkctl_kernels.attention import attention

    return [(2, head_dim), (1, head_dim), (1, head_dim)], lambda packed, q, k, v: attention(q, k, v, packed, window)


def _convolution(key_dim: int, value_dim: int, taps: int) -> tuple[list[tuple[int, ...]], Call]:
    import torch
    from sparkctl_kernels.causal_conv import causal_conv

    channels = 2 * key_dim + 2 * value_dim
    weight_CW = torch.randn(channels, taps, generator=torch.Generator().manual_seed(1))

    def call(packed: Documents, x_TC: torch.Tensor) -> Any:
        return causal_conv(x_TC, weight_CW.to(x_TC), packed.positions, 1, key_dim)

    return [(channels,)], call


def _recurrence(key_dim: int, value_dim: int) -> tuple[list[tuple[int, ...]], Call]:
    import torch
    from sparkctl_kernels.gated_delta import gated_delta

    def call(
        packed: Documents, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> Any:
        slow, bias = (torch.full((2,), value, device=v.device) for value in (SLOW, 0.0))
        return gated_delta(_unit(q), _unit(k), v, a, b, slow, bias, packed)

    return [(1, key_dim), (1, key_dim), (2, value_dim), (2,), (2,)], call


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.float().norm(dim=-1, keepdim=True).to(x.dtype)


def _finding(part: str, shapes: list[tuple[int, ...]], call: Call, device: torch.device) -> Finding:
    """Outputs and input gradients of the first and the last document, when the one between them changes."""
    import torch
    from sparkctl_kernels.documents import documents

    packed, joined = documents(LENGTHS, device), documents([sum(LENGTHS)], device)
    generator = torch.Generator().manual_seed(0)

    def random() -> list[torch.Tensor]:
        return [torch.randn(sum(LENGTHS), *s, generator=generator).to(device, torch.bfloat16) for s in shapes]

    first, last = LENGTHS[0], LENGTHS[2]
    kept = random()
    changed = [
        torch.cat([a[:first], b[first:-last], a[-last:]]) for a, b in zip(kept, random(), strict=True)
    ]  # fmt: skip
    before, again, after = (_others(call, packed, inputs) for inputs in (kept, kept, changed))
    planted = difference(_others(call, joined, kept), _others(call, joined, changed))
    return Finding(SUBJECT, part, difference(before, after), difference(before, again), planted)


def _others(call: Call, packed: Documents, inputs: list[torch.Tensor]) -> Tensors:
    """Rows of outputs and input gradients that belong to the first and the last document."""
    import torch

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = call(packed, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    first, last = LENGTHS[0], LENGTHS[2]
    rows = [*(output.detach() for output in outputs), *gradients]
    return {str(i): torch.cat([x[:first], x[-last:]]).cpu() for i, x in enumerate(rows)}
