"""Operators on rows and heads of one token, for `bench kernels`: norms, activation, rotation, gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkctl.bench.subjects import BF16, Library, Sizes, Subject, graded

if TYPE_CHECKING:
    import torch

    from sparkctl.bench.subjects import Run, Tensors

# T tokens · D hidden · F FFN · N heads · K kv heads · H head dim
EPS = 1e-6


def rms_norm(z: Sizes) -> Subject:
    """With the residual addition; backward adds to the residual's gradient and makes the norm's output again."""
    import torch
    from sparkctl_kernels.rms_norm import op
    from sparkctl_kernels.rms_norm.reference import rms_norm as reference

    rows = (z.tokens, z.hidden)

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            y, d = torch.empty_like(t["x"]), t["d"]
            s = op.forward(t["x"], t["residual"], t["w"], EPS, z.offset, y)
            op.backward_(t["dy"], s, t["w"], EPS, z.offset, d)
            return dict(y=y, s=s, ds=d)

        return run

    def eager(t: Tensors) -> Run:
        def call(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            s = x + residual
            return reference(s, w, EPS, z.offset), s

        return graded(call, _named(t, "x", "residual", "w"), ("y", "s"), (t["dy"], t["d"]), dict(x="ds"))

    return Subject(
        "rms_norm", op.choice(z.device).kernel,
        lambda: z.random(x=rows, residual=rows, w=(z.hidden,), dy=rows, d=rows), ours, eager,
        bytes=9 * BF16 * z.tokens * z.hidden,
    )  # fmt: skip


def silu_mul(z: Sizes) -> Subject:
    """Gradients are written where gate and up stood."""
    import torch
    from sparkctl_kernels.silu_mul import op
    from sparkctl_kernels.silu_mul.reference import silu_mul as reference

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            y = torch.empty_like(t["dy"])
            op.forward(t["gate_up"], y)
            op.backward_(t["dy"], t["gate_up"])
            return dict(y=y, d=t["gate_up"])

        return run

    def eager(t: Tensors) -> Run:
        return graded(reference, {"gate_up_T2F": t["gate_up"]}, ("y",), (t["dy"],), dict(gate_up_T2F="d"))

    def library(t: Tensors) -> Run:
        from fla.modules.activations import swiglu

        def call(gate_up: torch.Tensor) -> torch.Tensor:
            return swiglu(*gate_up.chunk(2, dim=1))

        return graded(call, _named(t, "gate_up"), ("y",), (t["dy"],), dict(gate_up="d"))

    return Subject(
        "silu_mul", op.choice(z.device).kernel,
        lambda: z.random(gate_up=(z.tokens, 2 * z.ffn), dy=(z.tokens, z.ffn)), ours, eager,
        bytes=9 * BF16 * z.tokens * z.ffn, library=Library("fla swiglu", library),
    )  # fmt: skip


def qk_norm_rope(z: Sizes) -> Subject:
    """From the projections' outputs; q lies beside its gate in Qwen3.5."""
    import torch
    from sparkctl_kernels.qk_norm_rope import op
    from sparkctl_kernels.qk_norm_rope.reference import qk_norm_rope as reference

    q, k = (z.tokens, z.heads, z.head_dim), (z.tokens, z.kv_heads, z.head_dim)
    wide = (z.tokens, z.heads * (2 if z.hybrid else 1), z.head_dim)

    def rest(t: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        weights = (t["qw"], t["kw"]) if z.normed else (None, None)
        return *weights, t["angle"].cos(), t["angle"].sin()

    def queries(projected: torch.Tensor) -> torch.Tensor:
        return projected[:, ::2] if z.hybrid else projected

    def ours(t: Tensors) -> Run:
        more = rest(t)

        def run() -> Tensors:
            y_q, y_k = op.forward(queries(t["q"]), t["k"], *more, EPS, z.offset)
            dq, dk = queries(torch.empty_like(t["q"])), torch.empty_like(t["k"])
            op.backward(t["dq"], t["dk"], queries(t["q"]), t["k"], *more, EPS, z.offset, dq, dk)
            return dict(q=y_q, k=y_k, dq=dq, dk=dk)

        return run

    def eager(t: Tensors) -> Run:
        more = rest(t)

        def call(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reference(q, k, *more, EPS, z.offset)

        inputs = dict(q=queries(t["q"]), k=t["k"])
        return graded(call, inputs, ("q", "k"), (t["dq"], t["dk"]), dict(q="dq", k="dk"))

    return Subject(
        "qk_norm_rope", op.choice(z.device).kernel,
        lambda: z.random(
            q=wide, k=k, qw=(z.head_dim,), kw=(z.head_dim,), angle=(z.tokens, z.rotated // 2), dq=q, dk=k
        ),
        ours, eager, bytes=5 * BF16 * z.tokens * (z.heads + z.kv_heads) * z.head_dim, fixed=frozenset({"angle"}),
    )  # fmt: skip


def sigmoid_gate(z: Sizes) -> Subject:
    """On attention's output; the gate lies beside its query."""
    import torch
    from sparkctl_kernels.sigmoid_gate import op
    from sparkctl_kernels.sigmoid_gate.reference import sigmoid_gate as reference

    heads = (z.tokens, z.heads, z.head_dim)

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            y, dgate = torch.empty_like(t["dy"]), torch.empty_like(t["q_proj"])[:, 1::2]
            op.forward(t["x"], t["q_proj"][:, 1::2], y)
            dx = op.backward_(t["dy"], t["x"], t["q_proj"][:, 1::2], dgate)
            return dict(y=y.view(heads), dx=dx, dgate=dgate)

        return run

    def eager(t: Tensors) -> Run:
        inputs = dict(x_TNH=t["x"], gate_TNH=t["q_proj"][:, 1::2])
        return graded(reference, inputs, ("y",), (t["dy"].view(heads),), dict(x_TNH="dx", gate_TNH="dgate"))

    return Subject(
        "sigmoid_gate", op.choice(z.device).kernel,
        lambda: z.random(
            x=heads, q_proj=(z.tokens, 2 * z.heads, z.head_dim), dy=(z.tokens, z.heads * z.head_dim)
        ),
        ours, eager, bytes=9 * BF16 * z.tokens * z.heads * z.head_dim,
    )  # fmt: skip


def gated_norm(z: Sizes) -> Subject:
    """On the delta rule's output."""
    import torch
    from sparkctl_kernels.gated_norm import op
    from sparkctl_kernels.gated_norm.reference import gated_norm as reference

    heads = (z.tokens, z.value_heads, z.value_dim)

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            y, dz = torch.empty_like(t["dy"]), torch.empty_like(t["z"])
            op.forward(t["x"], t["z"], t["w"], EPS, y)
            dx, _ = op.backward_(t["dy"], t["x"], t["z"], t["w"], EPS, dz)
            return dict(y=y.view(heads), dx=dx, dz=dz)

        return run

    def eager(t: Tensors) -> Run:
        def call(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return reference(x, z, w, EPS)

        return graded(call, _named(t, "x", "z", "w"), ("y",), (t["dy"].view(heads),), dict(x="dx", z="dz"))

    return Subject(
        "gated_norm", op.choice(z.device).kernel,
        lambda: z.random(x=heads, z=heads, w=(z.value_dim,), dy=(z.tokens, z.value_heads * z.value_dim)), ours, eager,
        bytes=9 * BF16 * z.tokens * z.value_heads * z.value_dim,
    )  # fmt: skip


def _named(t: Tensors, *names: str) -> Tensors:
    return {name: t[name] for name in names}
