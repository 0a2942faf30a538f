"""On a GPU: tensors of more than 2³¹ values, whose last rows lie where an int32 offset does not reach.

Rows of their own are computed once among all and once alone: the same bits. One GPU of 100 GB and more, nothing beside.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparkctl_kernels.attention import kernel as attention
from sparkctl_kernels.causal_conv import kernel as causal_conv
from sparkctl_kernels.distillation import kernel as distillation
from sparkctl_kernels.documents import documents
from sparkctl_kernels.gated_delta import kernel as gates
from sparkctl_kernels.gated_norm import kernel as gated_norm
from sparkctl_kernels.linear_cross_entropy import kernel as cross_entropy
from sparkctl_kernels.matmul import kernel as matmul
from sparkctl_kernels.qk_norm_rope import kernel as rope
from sparkctl_kernels.rms_norm import kernel as rms_norm
from sparkctl_kernels.shapes import QWEN35, VOCABULARY
from sparkctl_kernels.sigmoid_gate import kernel as sigmoid_gate
from sparkctl_kernels.silu_mul import kernel as silu_mul

GPU = torch.device("cuda")
BEYOND = 1 << 31
BYTES = 100e9
LARGEST = QWEN35[-1]
TAIL = 96  # rows at the end, all of them behind BEYOND


def roomy() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > BYTES


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not roomy(), reason="needs a CUDA device of 100 GB"),
    pytest.mark.timeout(600),
]

Results = tuple[torch.Tensor, ...]


def rows_beyond(width: int) -> int:
    """Rows of this width, the last TAIL of which begin behind BEYOND."""
    return -(-BEYOND // width) + TAIL


def whole_documents(width: int) -> int:
    """The same, and a multiple of TAIL."""
    return -(-rows_beyond(width) // TAIL) * TAIL


def long(rows: int, width: int) -> torch.Tensor:
    """[rows, width] bf16: zero, but for random rows at the end and, where int32 would wrap to, at the beginning."""
    made = torch.zeros(rows, width, dtype=torch.bfloat16, device=GPU)
    for part in (made[:TAIL], made[-TAIL:]):
        part.normal_()
    return made


def blank(rows: int, width: int) -> torch.Tensor:
    return torch.full((rows, width), float("nan"), dtype=torch.bfloat16, device=GPU)


def same_at_the_end(whole: Results, alone: Results) -> None:
    """Of [rows, …] tensors: the last TAIL rows are those computed alone, and none of them is NaN or zero."""
    for found, wanted in zip(whole, alone, strict=True):
        assert found[-TAIL:].any()
        assert torch.equal(found[-TAIL:], wanted)


def at_the_end(call: Callable[..., Results], *inputs: torch.Tensor) -> None:
    """`call` on tensors of all rows and on copies of their last TAIL."""
    tails = [x[-TAIL:].clone() for x in inputs]
    same_at_the_end(call(*inputs), call(*tails))


def test_silu_mul() -> None:
    width = LARGEST.ffn

    def forward(gate_up: torch.Tensor) -> Results:
        y = blank(len(gate_up), width)
        silu_mul.forward(gate_up, y)
        return (y,)

    def backward(gate_up: torch.Tensor) -> Results:
        dy = gate_up[:, :width].clone()
        silu_mul.backward_(dy, gate_up)
        return gate_up, dy

    gate_up = long(rows_beyond(2 * width), 2 * width)
    assert gate_up.numel() > BEYOND
    at_the_end(forward, gate_up)
    at_the_end(backward, gate_up)


def test_rms_norm() -> None:
    width, weight = LARGEST.hidden, torch.randn(LARGEST.hidden, device=GPU).bfloat16()

    def through(x: torch.Tensor) -> Results:
        y = blank(len(x), width)
        rms_norm.forward(x, None, weight, 1e-6, 1.0, y, x)
        d = blank(len(x), width)
        rms_norm.backward(y, x, weight, 1e-6, 1.0, d, add=False, low_TD=None, remake=False, want_weight=False)
        return y, d

    at_the_end(through, long(rows_beyond(width), width))


def test_sigmoid_gate() -> None:
    heads, dim = LARGEST.heads, LARGEST.head_dim

    def through(x: torch.Tensor) -> Results:
        o, y, gates = x.unflatten(1, (heads, dim)), blank(*x.shape), torch.empty_like(x).unflatten(1, (heads, dim))
        sigmoid_gate.forward(o, o, y)
        do = torch.empty_like(o)
        sigmoid_gate.backward_(y.clone(), o, o, do, gates)
        return y, do, gates

    at_the_end(through, long(rows_beyond(heads * dim), heads * dim))


def test_gated_norm() -> None:
    heads, dim = LARGEST.value_heads, LARGEST.delta_dim
    weight = torch.randn(dim, device=GPU).bfloat16()

    def through(x: torch.Tensor) -> Results:
        o, y = x.unflatten(1, (heads, dim)), blank(*x.shape)
        gated_norm.forward(o, o, weight, 1e-6, y)
        do, dz = torch.empty_like(o), torch.empty_like(o)
        gated_norm.backward_(y.clone(), o, o, weight, 1e-6, do, dz, False)
        return y, do, dz

    at_the_end(through, long(rows_beyond(heads * dim), heads * dim))


def test_qk_norm_rope() -> None:
    heads, kv_heads, dim = LARGEST.heads, LARGEST.kv_heads, LARGEST.head_dim
    width, weight = heads * dim, torch.randn(dim, device=GPU).bfloat16()

    def through(q: torch.Tensor, k: torch.Tensor, angle: torch.Tensor) -> Results:
        q, k, cos, sin = *(x.unflatten(1, (-1, dim)) for x in (q, k)), angle.cos(), angle.sin()
        rotated, rotated_k = rope.forward(q, k, weight, weight, cos, sin, 1e-6, 1.0)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        rope.backward(rotated, rotated_k, q, k, weight, weight, cos, sin, 1e-6, 1.0, dq, dk, False)
        return rotated, rotated_k, dq, dk

    rows = rows_beyond(width)
    at_the_end(
        through, long(rows, width), long(rows, kv_heads * dim), torch.rand(rows, LARGEST.rotated // 2, device=GPU)
    )  # fmt: skip


def test_causal_conv() -> None:
    """The last TAIL rows are a document, so that they do not look at those before."""
    keys, dim, values = LARGEST.key_heads, LARGEST.delta_dim, LARGEST.value_heads * LARGEST.delta_dim
    width, group = 2 * keys * dim + values, LARGEST.value_heads // keys
    weight = torch.randn(width, 4, device=GPU).bfloat16()

    def through(x: torch.Tensor) -> Results:
        rows = len(x)
        places = torch.arange(rows, dtype=torch.int32, device=GPU)
        places[-TAIL:] = torch.arange(TAIL, dtype=torch.int32, device=GPU)
        q, k, v = causal_conv.forward(x, weight, places, keys, dim)
        dx, d = torch.empty_like(x), v.unflatten(1, (keys * group, dim))
        causal_conv.backward(d, d, v, None, x, weight, places, keys, dx, False)
        return q, k, v, dx

    at_the_end(through, long(rows_beyond(width), width))


def test_gates() -> None:
    """Of the delta rule: a and b are columns of a projection's output. Documents of TAIL rows."""
    heads = LARGEST.value_heads
    width = (2 * LARGEST.key_heads + 2 * heads) * LARGEST.delta_dim + 2 * heads
    rates, bias = torch.randn(2, heads, device=GPU)

    def through(x: torch.Tensor) -> Results:
        a, b, d = x[:, -heads:], x[:, -2 * heads : -heads], torch.empty_like(x)
        packed = documents([TAIL] * (len(x) // TAIL), GPU)
        g, beta = gates.forward(a, b, rates, bias, packed)
        da, db = d[:, -heads:], d[:, -2 * heads : -heads]
        gates.backward(g, g, beta, a, b, rates, bias, packed, da, db, False)
        return g, beta, da, db

    at_the_end(through, long(whole_documents(width), width))


def test_attention() -> None:
    """Documents of TAIL rows."""
    heads, kv_heads, dim = LARGEST.heads, LARGEST.kv_heads, LARGEST.head_dim

    def through(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Results:
        packed = documents([TAIL] * (len(q) // TAIL), GPU)
        q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
        o, saved = attention.forward(q, k, v, packed, None)
        dv = torch.empty_like(v)
        dq, dk = attention.backward(o, saved, packed, None, dv)
        return o, dq, dk, dv

    rows = whole_documents(heads * dim)
    at_the_end(through, long(rows, heads * dim), *(long(rows, kv_heads * dim) for _ in range(2)))


def test_a_draft_s_own_keys() -> None:
    heads, kv_heads, dim, pairs = LARGEST.heads, LARGEST.kv_heads, LARGEST.head_dim, 6

    def through(q: torch.Tensor, own: torch.Tensor, past: torch.Tensor) -> Results:
        q = q.unflatten(1, (heads, dim))
        k = own.unflatten(1, (kv_heads, dim)).expand(pairs, -1, -1, -1).contiguous()
        o, log_sum = attention.own(q, k, k, q, past.T.contiguous(), 1.0)
        dq = q.clone()
        dk, dv = attention.own_backward_(dq, o, q, k, k, o, log_sum, 1.0)
        return o, log_sum.T, dq, dk[-1], dv[-1]

    rows = rows_beyond(heads * dim)
    assert pairs * rows * kv_heads * dim > BEYOND
    at_the_end(through, long(rows, heads * dim), long(rows, kv_heads * dim), torch.randn(rows, heads, device=GPU))


def test_matmul() -> None:
    """Whole numbers, whose sums are exact: few rows are multiplied in other tiles."""
    width = LARGEST.hidden
    w = torch.randint(-2, 3, (128, width), device=GPU).bfloat16()

    def through(x: torch.Tensor) -> Results:
        y, z = blank(len(x), 128), blank(len(x), width)
        matmul.matmul(x, w.T, y)
        matmul.matmul(y, w, z)
        return y, z

    at_the_end(through, long(rows_beyond(width), width).round_())


def test_cross_entropy() -> None:
    def losses(logits: torch.Tensor, labels: torch.Tensor) -> Results:
        found = torch.empty(len(logits), dtype=torch.float32, device=GPU)
        cross_entropy.cross_entropy_(logits, labels, found, 0.5, True)
        return found, logits

    rows = rows_beyond(VOCABULARY)
    at_the_end(losses, long(rows, VOCABULARY), torch.arange(rows, device=GPU))


def test_divergence() -> None:
    def divergences(logits: torch.Tensor) -> Results:
        targets, found = logits.flip(1), torch.empty(len(logits), dtype=torch.float32, device=GPU)
        sums = distillation.log_sums(targets)
        distillation.divergence_(logits, targets, sums, torch.ones_like(found), found, 0.5, True)
        return sums, found, logits

    at_the_end(divergences, long(rows_beyond(VOCABULARY), VOCABULARY))
