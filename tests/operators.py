"""The public operators, those with gradients by autograd: what the interpreter and the GPU tests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import randn
from sparkctl_kernels.attention import attention
from sparkctl_kernels.attention.reference import attention as attention_reference
from sparkctl_kernels.causal_conv import causal_conv
from sparkctl_kernels.causal_conv.reference import causal_conv as causal_conv_reference
from sparkctl_kernels.causal_conv.reference import unit
from sparkctl_kernels.documents import documents
from sparkctl_kernels.gated_delta import gated_delta
from sparkctl_kernels.gated_delta.reference import gated_delta as gated_delta_reference
from sparkctl_kernels.gated_norm import gated_norm
from sparkctl_kernels.gated_norm.reference import gated_norm as gated_norm_reference
from sparkctl_kernels.linear_cross_entropy import linear_cross_entropy
from sparkctl_kernels.linear_cross_entropy.reference import linear_cross_entropy as linear_cross_entropy_reference
from sparkctl_kernels.lora_linear import lora_linear
from sparkctl_kernels.lora_linear.reference import lora_linear as lora_linear_reference
from sparkctl_kernels.matmul import matmul
from sparkctl_kernels.matmul.reference import matmul as matmul_reference
from sparkctl_kernels.qk_norm_rope import qk_norm_rope
from sparkctl_kernels.qk_norm_rope.reference import qk_norm_rope as qk_norm_rope_reference
from sparkctl_kernels.rms_norm import add_rms_norm, rms_norm
from sparkctl_kernels.rms_norm.reference import add_rms_norm as add_rms_norm_reference
from sparkctl_kernels.rms_norm.reference import rms_norm as rms_norm_reference
from sparkctl_kernels.sigmoid_gate import sigmoid_gate
from sparkctl_kernels.sigmoid_gate.reference import sigmoid_gate as sigmoid_gate_reference
from sparkctl_kernels.silu_mul import silu_mul
from sparkctl_kernels.silu_mul.reference import silu_mul as silu_mul_reference

CPU = torch.device("cpu")
LENGTHS = [5, 9, 1]
T = sum(LENGTHS)
PACKED = documents(LENGTHS, CPU)
LABELS = torch.arange(T) % 50
ANGLE = torch.linspace(0, 3, T * 4).view(T, 4)
ROTATION = (ANGLE.cos(), ANGLE.sin())
Layout = Callable[[torch.Tensor], torch.Tensor]


class Operator(NamedTuple):
    """`call` and `reference` take the inputs, which have gradients, and behind them the tables, which have none."""

    inputs: Callable[[], list[torch.Tensor]]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    tables: tuple[torch.Tensor, ...] = ()


OPERATORS = {
    "rms_norm": Operator(
        lambda: [randn(T, 33), randn(33)],
        lambda x, w: rms_norm(x, w, 1e-6, 1.0),
        lambda x, w: rms_norm_reference(x, w, 1e-6, 1.0),
    ),
    "add_rms_norm": Operator(
        lambda: [randn(T, 33), randn(T, 33), randn(33)],
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6, 0.0),
    ),
    "silu_mul": Operator(lambda: [randn(T, 66)], silu_mul, silu_mul_reference),
    "sigmoid_gate": Operator(lambda: [randn(T, 2, 16), randn(T, 2, 16)], sigmoid_gate, sigmoid_gate_reference),
    "gated_norm": Operator(
        lambda: [randn(T, 2, 16), randn(T, 2, 16), randn(16)],
        lambda x, z, w: gated_norm(x, z, w, 1e-6),
        lambda x, z, w: gated_norm_reference(x, z, w, 1e-6),
    ),
    "qk_norm_rope": Operator(
        lambda: [randn(T, 2, 16), randn(T, 1, 16), randn(16), randn(16)],
        lambda *tensors: qk_norm_rope(*tensors, 1e-6, 1.0),
        lambda *tensors: qk_norm_rope_reference(*tensors, 1e-6, 1.0),
        ROTATION,
    ),
    "attention": Operator(
        lambda: [randn(T, 2, 16), randn(T, 1, 16), randn(T, 1, 16)],
        lambda q, k, v: attention(q, k, v, PACKED, 7),
        lambda q, k, v: attention_reference(q, k, v, LENGTHS, 7),
    ),
    "causal_conv": Operator(
        lambda: [randn(T, 96), randn(96, 4)],
        lambda *tensors: causal_conv(*tensors, 2, 16),
        lambda *tensors: causal_conv_reference(*tensors, 2, 16),
        (PACKED.positions,),
    ),
    "gated_delta": Operator(
        lambda: [
            unit(randn(T, 1, 64)), unit(randn(T, 1, 64)), randn(T, 2, 64), randn(T, 2), randn(T, 2), randn(2), randn(2),
        ],
        lambda *tensors: gated_delta(*tensors, PACKED),
        lambda *tensors: gated_delta_reference(*tensors, LENGTHS),
    ),
    "matmul": Operator(lambda: [randn(T, 33), randn(33, 21)], matmul, matmul_reference),
    "lora_linear": Operator(
        lambda: [randn(T, 33), randn(21, 33), randn(21), randn(4, 33), randn(21, 4)],
        lambda *tensors: lora_linear(*tensors, 0.5),
        lambda *tensors: lora_linear_reference(*tensors, 0.5),
    ),
    "linear_cross_entropy": Operator(
        lambda: [randn(T, 32), randn(50, 32)],
        lambda *tensors: linear_cross_entropy(*tensors, 1 / T, 20),
        lambda *tensors: linear_cross_entropy_reference(*tensors) / T,
        (LABELS,),
    ),
}  # fmt: skip


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Of a last dimension twice as long; NaN lies between, or 0 where values are integers."""
    between = torch.full_like(x, float("nan") if x.is_floating_point() else 0)
    return torch.stack([x, between], dim=-1).flatten(-2)[..., ::2] if x.dim() else x


def columns(x: torch.Tensor) -> torch.Tensor:
    """Of a wider buffer full of NaN."""
    return F.pad(x, (3, 2), value=float("nan"))[..., 3:-2] if x.dim() > 1 else x


def swapped(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """These two dimensions lie in memory the other way round."""
    return x.transpose(first, second).contiguous().transpose(first, second) if x.dim() > 1 else x


# The same values with other strides
LAYOUTS: dict[str, Layout] = {
    "every second": every_second,
    "columns": columns,
    "first two swapped": partial(swapped, first=0, second=1),
    "last two swapped": partial(swapped, first=-2, second=-1),
}


def results(
    call: Callable[..., Any], tensors: list[torch.Tensor], tables: tuple[torch.Tensor, ...] = (),
    gradients: Layout = torch.clone,
) -> list[torch.Tensor]:  # fmt: skip
    """Outputs and gradients. `gradients` may lay out what is given to backward, or replace it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = call(*leaves, *tables)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    given = [gradients(torch.randn(output.shape, generator=generator)) for output in outputs]
    torch.autograd.backward(outputs, given)
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves)]


def schemas() -> list[tuple[str, tuple[Any, ...]]]:
    """Every torch.library operator, with arguments: contiguous ones, and views where it is given them as they are."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    q, k, v = leaf(T, 2, 16), leaf(T, 1, 16), leaf(T, 1, 16)
    adapter = torch.randn(33, 4).T, torch.randn(4, 21).T
    gates_of = (torch.randn(T, 1), torch.randn(T, 1), torch.randn(1), torch.randn(1))
    return [
        ("add_rms_norm", (leaf(T, 32), None, leaf(32), 1e-6, 1.0)),
        ("add_rms_norm", (leaf(T, 32), leaf(T, 32), leaf(32), 1e-6, 0.0)),
        ("silu_mul", (leaf(T, 64),)),
        ("sigmoid_gate", (leaf(T, 2, 16), leaf(T, 2, 16))),
        ("gated_norm", (leaf(T, 2, 16), leaf(T, 2, 16), leaf(16), 1e-6)),
        ("qk_norm_rope", (q, k, leaf(16), leaf(16), *ROTATION, 1e-6, 1.0)),
        ("qk_norm_rope", (q, k, None, None, *ROTATION, 0.0, 0.0)),
        ("attention", (q, k, v, LENGTHS, None)),
        ("causal_conv", (leaf(T, 96), leaf(96, 4), PACKED.positions, 2, 16)),
        ("gated_delta", (leaf(T, 1, 64), leaf(T, 1, 64), leaf(T, 1, 64), *gates_of, LENGTHS)),
        ("matmul", (leaf(T, 33), leaf(21, 33).T)),
        ("lora_linear", (leaf(T, 33), torch.randn(21, 33), None, leaf(4, 33), leaf(21, 4), 0.5)),
        ("lora_linear", (leaf(T, 33), leaf(21, 33), leaf(21), leaf(4, 33), leaf(21, 4), 0.5)),
        ("linear_cross_entropy", (leaf(T, 32), leaf(50, 32), LABELS, 0.1, 20, True)),
        ("sigmoid_gate", (leaf(T, 2, 16), leaf(T, 4, 16)[:, 1::2])),
        ("gated_norm", (leaf(T, 2, 16), leaf(T, 4, 16)[:, 2:], leaf(16), 1e-6)),
        ("qk_norm_rope", (leaf(T, 4, 16)[:, ::2], leaf(T, 3, 16)[:, 2:], leaf(16), leaf(16), *ROTATION, 1e-6, 1.0)),
        ("causal_conv", (leaf(T, 99)[:, 2:98], leaf(96, 4), PACKED.positions, 2, 16)),
        ("matmul", (leaf(33, T).T, leaf(33, 42)[:, ::2])),
        ("lora_linear", (leaf(T, 33), leaf(33, 21).T, leaf(42)[::2], leaf(33, 4).T, leaf(4, 21).T, 0.5)),
        ("lora_linear_backward", (*map(torch.randn, (T, T, T, 21), (21, 33, 4, 33)), *adapter, 0.5)),
        ("linear_cross_entropy", (leaf(T, 32), leaf(32, 50).T, LABELS, 0.1, 20, True)),
    ]  # fmt: skip
