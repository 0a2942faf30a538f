"""Cases of the operators that work on rows and heads of one token: norms, gates, rotation, products, cross-entropy."""

from __future__ import annotations

import torch
from kernel_cases import Case, Plant, Tensors, Wide, autograd, blank, output_gradient, randn
from sparkctl_kernels.gated_norm import op as gated_norm
from sparkctl_kernels.gated_norm.reference import gated_norm as gated_norm_reference
from sparkctl_kernels.linear_cross_entropy import op as linear_cross_entropy
from sparkctl_kernels.linear_cross_entropy.reference import linear_cross_entropy as linear_cross_entropy_reference
from sparkctl_kernels.matmul import op as matmul
from sparkctl_kernels.matmul.reference import matmul as matmul_reference
from sparkctl_kernels.qk_norm_rope import op as qk_norm_rope
from sparkctl_kernels.qk_norm_rope.reference import qk_norm_rope as qk_norm_rope_reference
from sparkctl_kernels.rms_norm import op as rms_norm
from sparkctl_kernels.rms_norm.reference import rms_norm as rms_norm_reference
from sparkctl_kernels.sigmoid_gate import op as sigmoid_gate
from sparkctl_kernels.sigmoid_gate.reference import sigmoid_gate as sigmoid_gate_reference
from sparkctl_kernels.silu_mul import op as silu_mul
from sparkctl_kernels.silu_mul.reference import silu_mul as silu_mul_reference


def rms_norm_case(tokens: int, width: int, offset: float, eps: float = 1e-5) -> Case:
    def fused(t: Tensors) -> Tensors:
        x, residual, w = t["x"], t["residual"], t["w"]
        y = Wide(tokens, width, x)
        s = rms_norm.forward(x, residual, w, eps, offset, y.part)
        y.check()
        dy, d, low = Wide(tokens, width, x), output_gradient(x.shape, x, 8), blank(x)
        dw = rms_norm.backward_(
            dy.of(output_gradient(x.shape, x)), s, w, eps, offset, d, low_TD=low, want_weight=True
        )  # fmt: skip
        dy.check()
        alone, ds = Wide(tokens, width, x), blank(x)
        rms_norm.forward(x, None, w, eps, offset, alone.part)
        again = output_gradient(x.shape, x)
        rms_norm.backward_(again, x, w, eps, offset, ds, add=False, remake=False)
        return dict(y=y.part, s=s, ds=d, low=low, dw=dw, remade=dy.part, alone=alone.part, dx=ds)

    def reference(t: Tensors) -> Tensors:
        x, residual, w = t["x"], t["residual"], t["w"]
        s = x + residual
        found = autograd(
            lambda s, w: (rms_norm_reference(s, w, eps, offset), s), dict(s=s, w=w), ("y", "s"),
            (output_gradient(x.shape, x), output_gradient(x.shape, x, 8)), dict(s="ds", w="dw"),
        )  # fmt: skip
        alone = autograd(
            lambda x, w: rms_norm_reference(x, w, eps, offset), dict(x=x, w=w), ("alone",),
            (output_gradient(x.shape, x),), dict(x="dx"),
        )  # fmt: skip
        return found | alone | dict(low=found["ds"], remade=found["y"])

    kernel = "rms_norm.kernel"
    return Case(
        f"rms_norm-{tokens}x{width}+{offset:.0f}",
        lambda: dict(x=randn(tokens, width), residual=randn(tokens, width), w=randn(width)),
        fused, reference,
        dict(
            y=Plant(kernel, "forward", at=5), s=Plant(kernel, "forward", at=6), ds=Plant(kernel, "backward", at=5),
            dw=Plant(kernel, "backward"), remade=Plant(kernel, "backward", at=0), alone=Plant(kernel, "forward", at=5),
            dx=Plant(kernel, "backward", at=5), low=Plant(kernel, "backward", at="low_TD"),
        ),
    )  # fmt: skip


def silu_mul_case(tokens: int, width: int) -> Case:
    def fused(t: Tensors) -> Tensors:
        x = t["gate_up"].clone()
        y = Wide(tokens, width, x)
        silu_mul.forward(x, y.part)
        y.check()
        dy = Wide(tokens, width, x)
        silu_mul.backward_(dy.of(output_gradient((tokens, width), x)), x)
        dy.check()
        return dict(y=y.part, d=x, remade=dy.part)

    def reference(t: Tensors) -> Tensors:
        d = output_gradient((tokens, width), t["gate_up"])
        found = autograd(lambda gate_up: silu_mul_reference(gate_up), t, ("y",), (d,), dict(gate_up="d"))
        return found | dict(remade=found["y"])

    kernel = "silu_mul.kernel"
    return Case(
        f"silu_mul-{tokens}x{width}", lambda: dict(gate_up=randn(tokens, 2 * width)), fused, reference,
        dict(
            y=Plant(kernel, "forward", at=1), d=Plant(kernel, "backward_", at=1),
            remade=Plant(kernel, "backward_", at=0),
        ),
    )  # fmt: skip


def sigmoid_gate_case(tokens: int, heads: int, dim: int) -> Case:
    shape = (tokens, heads, dim)

    def gates_of(whole: torch.Tensor) -> torch.Tensor:
        """As Qwen3.5's q_proj leaves them: each behind its head's query."""
        return whole.view(tokens, 2 * heads, dim)[:, 1::2]

    def fused(t: Tensors) -> Tensors:
        x, gate = t["x"], gates_of(t["q_proj"])
        y = Wide(tokens, heads * dim, x)
        sigmoid_gate.forward(x, gate, y.part)
        y.check()
        dy, d_proj = Wide(tokens, heads * dim, x), blank(t["q_proj"])
        dx = sigmoid_gate.backward_(dy.of(output_gradient(shape, x).flatten(1)), x, gate, gates_of(d_proj))
        dy.check()
        assert d_proj.view(tokens, 2 * heads, dim)[:, ::2].isnan().all()
        return dict(y=y.part, dx=dx, dgate=gates_of(d_proj), remade=dy.part)

    def reference(t: Tensors) -> Tensors:
        inputs = dict(x=t["x"], gate=gates_of(t["q_proj"]))
        found = autograd(
            lambda x, gate: sigmoid_gate_reference(x, gate), inputs, ("y",), (output_gradient(shape, t["x"]),),
            dict(x="dx", gate="dgate"),
        )  # fmt: skip
        found["y"] = found["y"].flatten(1)
        return found | dict(remade=found["y"])

    kernel = "sigmoid_gate.kernel"
    return Case(
        f"sigmoid_gate-{tokens}x{heads}x{dim}",
        lambda: dict(x=randn(*shape), q_proj=randn(tokens, 2 * heads * dim)),
        fused, reference,
        dict(
            y=Plant(kernel, "forward", at=2), dx=Plant(kernel, "backward_", at=3),
            dgate=Plant(kernel, "backward_", at=4), remade=Plant(kernel, "backward_", at=0),
        ),
    )  # fmt: skip


def gated_norm_case(tokens: int, heads: int, dim: int, eps: float = 1e-6) -> Case:
    shape = (tokens, heads, dim)

    def fused(t: Tensors) -> Tensors:
        x, w = t["x"], t["w"]
        z = t["z_wide"][:, 7 : 7 + heads * dim].unflatten(1, shape[1:])
        y = Wide(tokens, heads * dim, x)
        gated_norm.forward(x, z, w, eps, y.part)
        y.check()
        dy, dz = Wide(tokens, heads * dim, x), Wide(tokens, heads * dim, x)
        dx, dw = gated_norm.backward_(
            dy.of(output_gradient(shape, x).flatten(1)), x, z, w, eps, dz.part.unflatten(1, shape[1:]), True
        )
        dy.check()
        dz.check()
        return dict(y=y.part, dx=dx, dz=dz.part, dw=dw, remade=dy.part)

    def reference(t: Tensors) -> Tensors:
        z = t["z_wide"][:, 7 : 7 + heads * dim].unflatten(1, shape[1:])
        found = autograd(
            lambda x, z, w: gated_norm_reference(x, z, w, eps), dict(x=t["x"], z=z, w=t["w"]), ("y",),
            (output_gradient(shape, t["x"]),), dict(x="dx", z="dz", w="dw"),
        )  # fmt: skip
        found |= dict(y=found["y"].flatten(1), dz=found["dz"].flatten(1))
        return found | dict(remade=found["y"])

    kernel = "gated_norm.kernel"
    return Case(
        f"gated_norm-{tokens}x{heads}x{dim}",
        lambda: dict(x=randn(*shape), z_wide=randn(tokens, heads * dim + 9), w=randn(dim)),
        fused, reference,
        dict(
            y=Plant(kernel, "forward", at=4), dx=Plant(kernel, "backward_", at=5), dz=Plant(kernel, "backward_", at=6),
            dw=Plant(kernel, "backward_"), remade=Plant(kernel, "backward_", at=0),
        ),
    )  # fmt: skip


def rope_case(
    tokens: int, heads: int, kv_heads: int, dim: int, rotated: int, *, offset: float, gated: bool, normed: bool
) -> Case:
    widths = [heads * dim * (2 if gated else 1), kv_heads * dim]
    eps = 1e-6

    def views(projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (part.unflatten(1, (-1, dim)) for part in projected.split([*widths, 3], dim=1)[:2])
        return (q[:, ::2] if gated else q), k

    def angles(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return t["angle"].cos(), t["angle"].sin()

    def weights(t: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (t["qw"], t["kw"]) if normed else (None, None)

    def fused(t: Tensors) -> Tensors:
        projected = t["projected"]
        q, k = views(projected)
        y_q, y_k = qk_norm_rope.forward(q, k, *weights(t), *angles(t), eps, offset)
        d = blank(projected)
        dq, dk = views(d)
        dw = qk_norm_rope.backward(
            output_gradient(q.shape, q), output_gradient(k.shape, k, 8), q, k, *weights(t), *angles(t), eps, offset,
            dq, dk, normed,
        )  # fmt: skip
        assert d[:, sum(widths) :].isnan().all()
        found = dict(q=y_q, k=y_k, dq=dq, dk=dk)
        return found | (dict(dqw=dw[0], dkw=dw[1]) if dw is not None else {})

    def reference(t: Tensors) -> Tensors:
        q, k = views(t["projected"])
        inputs, names = dict(q=q, k=k), dict(q="dq", k="dk")
        if normed:
            inputs |= dict(qw=t["qw"], kw=t["kw"])
            names |= dict(qw="dqw", kw="dkw")

        def call(
            q: torch.Tensor, k: torch.Tensor, qw: torch.Tensor | None = None, kw: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return qk_norm_rope_reference(q, k, qw, kw, *angles(t), eps, offset)

        gradients = output_gradient(q.shape, q), output_gradient(k.shape, k, 8)
        return autograd(call, inputs, ("q", "k"), gradients, names)

    kernel = "qk_norm_rope.kernel"
    plants = dict(
        q=Plant(kernel, "forward", of=0), k=Plant(kernel, "forward", of=1), dq=Plant(kernel, "backward", at=10),
        dk=Plant(kernel, "backward", at=11),
    )  # fmt: skip
    if normed:
        plants |= dict(dqw=Plant(kernel, "backward", of=0), dkw=Plant(kernel, "backward", of=1))
    return Case(
        f"qk_norm_rope-{tokens}x{heads}/{kv_heads}x{dim}" + "-gated" * gated + "-normed" * normed,
        lambda: dict(
            projected=randn(tokens, sum(widths) + 3), qw=randn(dim), kw=randn(dim), angle=randn(tokens, rotated // 2)
        ),
        fused, reference, plants, fixed=("angle",),
    )  # fmt: skip


def matmul_case(tokens: int, width: int, out: int) -> Case:
    """A layer's three products, as `gemm` asks for them: into parts of wider buffers, from views, adding."""

    def parts(t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return t["x_wide"][:, 3 : 3 + width], t["w"], output_gradient((tokens, out), t["w"])

    def fused(t: Tensors) -> Tensors:
        x, w, dy = parts(t)
        y, dx, dw = Wide(tokens, out, x), Wide(tokens, width, x), Wide(out, width, t["total"])
        matmul.forward(x, w.T, y.part)
        matmul.forward(dy, w, dx.part)
        matmul.forward(dy.T, x, dw.of(t["total"]), 0.5, add=True)
        more = Wide(tokens, width, x)
        matmul.forward(dy, w, more.of(x), add=True)
        for written in (y, dx, dw, more):
            written.check()
        return dict(y=y.part, dx=dx.part, dw=dw.part, more=more.part)

    def reference(t: Tensors) -> Tensors:
        x, w, dy = parts(t)
        found = autograd(lambda x, w: matmul_reference(x, w.T), dict(x=x, w=w), ("y",), (dy,), dict(x="dx"))
        return found | dict(
            dw=matmul_reference(dy.T, x, t["total"], 0.5), more=matmul_reference(dy, w, x)
        )  # fmt: skip

    kernel = Plant("matmul.kernel", "matmul", at=2)
    return Case(
        f"matmul-{tokens}x{width}x{out}",
        lambda: dict(
            x_wide=randn(tokens, width + 5), w=randn(out, width, std=width**-0.5), total=randn(out, width)
        ),
        fused, reference, dict.fromkeys(("y", "dx", "dw", "more"), kernel), fixed=("total",),
    )  # fmt: skip


def cross_entropy_case(rows: int, width: int, vocabulary: int, chunk: int) -> Case:
    """Logits have a spread of about 2, whatever the width."""
    scale = 0.25

    def labels(t: Tensors) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(vocabulary, (rows,), generator=generator).to(t["hidden"].device)

    def fused(t: Tensors) -> Tensors:
        hidden, weight = t["hidden"], t["weight"]
        dhidden, dweight = blank(hidden), blank(weight).float()
        loss = linear_cross_entropy.forward(
            hidden, weight, labels(t), scale, dhidden_ND=dhidden, dweight_VD=dweight, add=False, chunk=chunk
        )
        alone = linear_cross_entropy.forward(hidden, weight, labels(t), scale, chunk=chunk)
        assert torch.equal(loss, alone)
        return dict(loss=loss, dhidden=dhidden, dweight=dweight)

    def reference(t: Tensors) -> Tensors:
        return autograd(
            lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, labels(t)), t, ("loss",),
            (torch.tensor(scale, device=t["hidden"].device),), dict(hidden="dhidden", weight="dweight"),
        )  # fmt: skip

    kernel = "linear_cross_entropy.kernel"
    return Case(
        f"linear_cross_entropy-{rows}x{width}x{vocabulary}/{chunk}",
        lambda: dict(hidden=randn(rows, width), weight=randn(vocabulary, width, std=2 * width**-0.5)),
        fused, reference,
        dict(
            loss=Plant(kernel, "cross_entropy_", at=2), dhidden=Plant(kernel, "cross_entropy_", at=0),
            dweight=Plant(kernel, "cross_entropy_", at=0),
        ),
    )  # fmt: skip
