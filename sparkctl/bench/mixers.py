"""Operators that look along documents, for `bench kernels`: attention, the convolution, the gated delta rule."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from sparkctl.bench.subjects import BF16, Library, Sizes, Subject, graded

if TYPE_CHECKING:
    import torch

    from sparkctl.bench.subjects import Form, Run, Tensors

# T tokens · N query or value heads · K kv or key heads · H head dim · D key dim · E value dim · C channels

TUNES = "flash-linear-attention tunes its kernels, about two minutes the first time (`--no-library` does without)"


def attention(z: Sizes) -> Subject:
    """Causal within documents. Torch's FlashAttention-2 and this project's kernel are each other's rival."""
    from sparkctl_kernels.attention import flash, op
    from sparkctl_kernels.attention.reference import attention as reference

    packed, kernel = z.packed, op.choice(z.device, z.head_dim).kernel
    q, k = (z.tokens, z.heads, z.head_dim), (z.tokens, z.kv_heads, z.head_dim)
    window = None if z.window is None or z.window >= packed.longest else z.window

    def by(module: ModuleType, t: Tensors) -> Run:
        import torch

        def run() -> Tensors:
            o, saved = module.forward(t["q"], t["k"], t["v"], packed, window)
            dv = torch.empty_like(t["v"])
            dq, dk = module.backward(t["do"], saved, packed, window, dv)
            return dict(o=o, dq=dq, dk=dk, dv=dv)

        return run

    def ours(t: Tensors) -> Run:
        return by(op, t)

    def triton(t: Tensors) -> Run:
        from sparkctl_kernels.attention import kernel

        return by(kernel, t)

    def eager(t: Tensors) -> Run:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return reference(q, k, v, z.lengths, window)

        inputs = {name: t[name] for name in ("q", "k", "v")}
        return graded(call, inputs, ("o",), (t["do"],), dict(q="dq", k="dk", v="dv"))

    rival = None
    if kernel == "flash":
        rival = Library("own triton", triton)
    elif flash.serves(z.device, z.head_dim):
        rival = Library("torch's flash", lambda t: by(flash, t))
    seen = sum(n * (n + 1) / 2 if window is None else n * min(n, window) for n in z.lengths)
    return Subject(
        "attention", kernel, lambda: z.random(q=q, k=k, v=k, do=q), ours, eager,
        bytes=BF16 * z.tokens * z.head_dim * (6 * z.heads + 6 * z.kv_heads),
        operations=14 * seen * z.heads * z.head_dim, library=rival,
    )  # fmt: skip


def causal_conv(z: Sizes) -> Subject:
    """The convolution with SiLU, queries and keys scaled to unit length."""
    from sparkctl_kernels.causal_conv import op
    from sparkctl_kernels.causal_conv.reference import causal_conv as reference

    packed, keys, values = z.packed, (z.tokens, z.key_heads, z.key_dim), z.value_heads * z.value_dim
    channels = 2 * z.key_heads * z.key_dim + values

    def ours(t: Tensors) -> Run:
        import torch

        def run() -> Tensors:
            q, k, v = op.forward(t["x"], t["w"], packed.positions, z.key_heads, z.key_dim)
            dx = torch.empty_like(t["x"])
            op.backward(t["dq"], t["dk"], t["dv"], t["x"], t["w"], packed.positions, z.key_heads, dx)
            return dict(q=q, k=k, v=v, dx=dx)

        return run

    def by(call: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]) -> Form:
        def form(t: Tensors) -> Run:
            inputs = dict(x=t["x"], w=t["w"])
            return graded(call, inputs, ("q", "k", "v"), (t["dq"], t["dk"], t["dv"]), dict(x="dx"))

        return form

    def eager(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference(x, w, packed.positions, z.key_heads, z.key_dim)

    def library(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.l2norm import l2norm

        y = causal_conv1d(x[None], w, activation="silu", cu_seqlens=packed.cu_seqlens)[0][0]
        q, k, v = y.split([keys[1] * keys[2], keys[1] * keys[2], values], dim=1)
        return l2norm(q.reshape(keys)), l2norm(k.reshape(keys)), v

    return Subject(
        "causal_conv", op.choice(z.device).kernel,
        lambda: z.random(x=(z.tokens, channels), w=(channels, z.taps), dq=keys, dk=keys, dv=(z.tokens, values)),
        ours, by(eager), bytes=5 * BF16 * z.tokens * channels, library=Library("fla causal_conv1d", by(library)),
    )  # fmt: skip


def gated_delta(z: Sizes) -> Subject:
    """Gates and chunked rule; A decays slowly, so that far tokens count."""
    from sparkctl_kernels.causal_conv.reference import unit
    from sparkctl_kernels.gated_delta import op
    from sparkctl_kernels.gated_delta.reference import gated_delta as reference

    packed, keys = z.packed, (z.tokens, z.key_heads, z.key_dim)
    values, gates = (z.tokens, z.value_heads, z.value_dim), (z.tokens, z.value_heads)

    def inputs() -> Tensors:
        t = z.random(q=keys, k=keys, v=values, a=gates, b=gates, log_a=gates[1:], bias=gates[1:], do=values)
        return t | dict(q=unit(t["q"]), k=unit(t["k"]), log_a=0.3 * t["log_a"] - 3, bias=0.3 * t["bias"])

    def ours(t: Tensors) -> Run:
        import torch

        def run() -> Tensors:
            given = t["q"], t["k"], t["v"], t["a"], t["b"], t["log_a"], t["bias"]
            o, saved = op.forward(*given, packed)
            da, db = torch.empty_like(t["a"]), torch.empty_like(t["b"])
            dq, dk, dk2, dv, _ = op.backward(t["do"], *given, saved, packed, da, db)
            dk = dk if dk2 is None else dk + dk2
            dq, dk = (x.unflatten(1, (z.key_heads, -1)).sum(2) for x in (dq, dk))
            return dict(o=o, dq=dq, dk=dk, dv=dv, da=da, db=db)

        return run

    def library(t: Tensors) -> Run:
        mine = ours(t)

        def run() -> Tensors:
            with op.by_library():
                return mine()

        return run

    def eager(t: Tensors) -> Run:
        def call(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, log_a: torch.Tensor,
            bias: torch.Tensor,
        ) -> torch.Tensor:  # fmt: skip
            return reference(q, k, v, a, b, log_a, bias, z.lengths)

        given = {name: tensor for name, tensor in t.items() if name != "do"}
        return graded(call, given, ("o",), (t["do"],), {name: f"d{name}" for name in ("q", "k", "v", "a", "b")})

    kernel = op.choice(z.device, z.key_dim).kernel
    on_fla = kernel.startswith("fla")
    return Subject(
        "gated_delta", kernel, inputs, ours, eager,
        bytes=4 * BF16 * z.tokens * (3 * z.key_heads * z.key_dim + 4 * z.value_heads * z.value_dim),
        operations=30 * z.tokens * z.value_heads * z.key_dim * z.value_dim, fixed=frozenset({"log_a", "bias"}),
        library=Library("fla's function", library, TUNES) if on_fla else None, judged_by_library=on_fla,
    )  # fmt: skip
