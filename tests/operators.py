"""The public operators, those with gradients by autograd: what the interpreter and the GPU tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

# name: inputs, the operator, its reference
OPERATORS: dict[str, tuple[Callable[[], list[torch.Tensor]], Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (
        lambda: [randn(T, 33), randn(33)],
        lambda x, w: rms_norm(x, w, 1e-6, 1.0),
        lambda x, w: rms_norm_reference(x, w, 1e-6, 1.0),
    ),
    "add_rms_norm": (
        lambda: [randn(T, 33), randn(T, 33), randn(33)],
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6, 0.0),
    ),
    "silu_mul": (lambda: [randn(T, 66)], silu_mul, silu_mul_reference),
    "sigmoid_gate": (lambda: [randn(T, 2, 16), randn(T, 2, 16)], sigmoid_gate, sigmoid_gate_reference),
    "gated_norm": (
        lambda: [randn(T, 2, 16), randn(T, 2, 16), randn(16)],
        lambda x, z, w: gated_norm(x, z, w, 1e-6),
        lambda x, z, w: gated_norm_reference(x, z, w, 1e-6),
    ),
    "qk_norm_rope": (
        lambda: [randn(T, 2, 16), randn(T, 1, 16), randn(16), randn(16)],
        lambda q, k, a, b: qk_norm_rope(q, k, a, b, *ROTATION, 1e-6, 1.0),
        lambda q, k, a, b: qk_norm_rope_reference(q, k, a, b, *ROTATION, 1e-6, 1.0),
    ),
    "attention": (
        lambda: [randn(T, 2, 16), randn(T, 1, 16), randn(T, 1, 16)],
        lambda q, k, v: attention(q, k, v, PACKED, 7),
        lambda q, k, v: attention_reference(q, k, v, LENGTHS, 7),
    ),
    "causal_conv": (
        lambda: [randn(T, 96), randn(96, 4)],
        lambda x, w: causal_conv(x, w, PACKED.positions, 2, 16),
        lambda x, w: causal_conv_reference(x, w, PACKED.positions, 2, 16),
    ),
    "gated_delta": (
        lambda: [
            unit(randn(T, 1, 64)), unit(randn(T, 1, 64)), randn(T, 2, 64), randn(T, 2), randn(T, 2), randn(2), randn(2),
        ],
        lambda *tensors: gated_delta(*tensors, PACKED),
        lambda *tensors: gated_delta_reference(*tensors, LENGTHS),
    ),
    "matmul": (lambda: [randn(T, 33), randn(33, 21)], matmul, matmul_reference),
    "lora_linear": (
        lambda: [randn(T, 33), randn(21, 33), randn(21), randn(4, 33), randn(21, 4)],
        lambda *tensors: lora_linear(*tensors, 0.5),
        lambda *tensors: lora_linear_reference(*tensors, 0.5),
    ),
    "linear_cross_entropy": (
        lambda: [randn(T, 32), randn(50, 32)],
        lambda h, w: linear_cross_entropy(h, w, LABELS, 1 / T, 20),
        lambda h, w: linear_cross_entropy_reference(h, w, LABELS) / T,
    ),
}  # fmt: skip


def results(call: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    torch.autograd.backward(outputs, weights)
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves)]


def schemas() -> list[tuple[str, tuple[Any, ...]]]:
    """Every torch.library operator, with arguments."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    q, k, v = leaf(T, 2, 16), leaf(T, 1, 16), leaf(T, 1, 16)
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
    ]  # fmt: skip
