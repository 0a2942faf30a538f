"""Cases of the operators that look along documents, and the lists of all: small ones and those of whole models."""

from __future__ import annotations

import torch
from draft_cases import distillation_case, draft_attention_case
from kernel_cases import Case, Plant, Tensors, Wide, autograd, blank, output_gradient, randn
from row_cases import (
    cross_entropy_case,
    gated_norm_case,
    matmul_case,
    rms_norm_case,
    rope_case,
    sigmoid_gate_case,
    silu_mul_case,
)  # fmt: skip
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.attention.reference import attention as attention_reference
from sparkctl_kernels.causal_conv import op as causal_conv
from sparkctl_kernels.causal_conv.reference import causal_conv as causal_conv_reference
from sparkctl_kernels.causal_conv.reference import unit
from sparkctl_kernels.documents import documents
from sparkctl_kernels.gated_delta import op as gated_delta
from sparkctl_kernels.gated_delta.reference import gated_delta as gated_delta_reference
from sparkctl_kernels.gated_delta.reference import gates, recurrence
from sparkctl_kernels.shapes import VOCABULARY, Shape


def attention_case(lengths: list[int], heads: int, kv_heads: int, dim: int, window: int | None = None) -> Case:
    tokens = sum(lengths)

    def fused(t: Tensors) -> Tensors:
        q, k, packed = t["q"], t["k"], documents(lengths, t["q"].device)
        v = t["v_wide"][:, 3 : 3 + kv_heads * dim].unflatten(1, (kv_heads, dim))
        o, saved = attention.forward(q, k, v, packed, window)
        do, dv = Wide(tokens, heads * dim, q), Wide(tokens, kv_heads * dim, q)
        do.of(output_gradient(q.shape, q).flatten(1))
        dq, dk = attention.backward(
            do.part.unflatten(1, (heads, dim)), saved, packed, window, dv.part.unflatten(1, (kv_heads, dim))
        )
        dv.check()
        return dict(o=o, dq=dq, dk=dk, dv=dv.part.unflatten(1, (kv_heads, dim)))

    def reference(t: Tensors) -> Tensors:
        v = t["v_wide"][:, 3 : 3 + kv_heads * dim].unflatten(1, (kv_heads, dim))
        return autograd(
            lambda q, k, v: attention_reference(q, k, v, lengths, window), dict(q=t["q"], k=t["k"], v=v), ("o",),
            (output_gradient(t["q"].shape, t["q"]),), dict(q="dq", k="dk", v="dv"),
        )  # fmt: skip

    kernel = "attention.op"
    return Case(
        f"attention-{tokens}x{heads}/{kv_heads}x{dim}" + (f"-window{window}" if window else ""),
        lambda: dict(
            q=randn(tokens, heads, dim), k=randn(tokens, kv_heads, dim), v_wide=randn(tokens, kv_heads * dim + 5)
        ),
        fused, reference,
        dict(
            o=Plant(kernel, "forward", of=0), dq=Plant(kernel, "backward", of=0), dk=Plant(kernel, "backward", of=1),
            dv=Plant(kernel, "backward", at=4),
        ),
    )  # fmt: skip


def causal_conv_case(lengths: list[int], key_heads: int, key_dim: int, values: int, group: int = 1) -> Case:
    tokens, key = sum(lengths), key_heads * key_dim
    channels = 2 * key + values

    def position(device: torch.device) -> torch.Tensor:
        return documents(lengths, device).positions

    def gradients(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """dq, dk in two parts, dv: as the delta rule gives them, for `group` value heads a key head."""
        heads = (tokens, key_heads * group, key_dim)
        parts = [output_gradient(heads, like, seed) for seed in (7, 8, 9)]
        return *parts, output_gradient((tokens, values), like, 10)

    def fused(t: Tensors) -> Tensors:
        x, w = t["x_wide"][:, 5 : 5 + channels], t["w"]
        q, k, v = causal_conv.forward(x, w, position(x.device), key_heads, key_dim)
        dq, dk, dk2, dv = gradients(x)
        dx = Wide(tokens, channels, x)
        dw = causal_conv.backward(dq, dk, dv, x, w, position(x.device), key_heads, dx.part, dk2, True)
        dx.check()
        return dict(q=q, k=k, v=v, dx=dx.part, dw=dw)

    def reference(t: Tensors) -> Tensors:
        x = t["x_wide"][:, 5 : 5 + channels]
        dq, dk, dk2, dv = gradients(x)
        dq, dk = (d.unflatten(1, (key_heads, group)).sum(2) for d in (dq, dk + dk2))
        return autograd(
            lambda x, w: causal_conv_reference(x, w, position(x.device), key_heads, key_dim), dict(x=x, w=t["w"]),
            ("q", "k", "v"), (dq, dk, dv), dict(x="dx", w="dw"),
        )  # fmt: skip

    kernel = "causal_conv.kernel"
    return Case(
        f"causal_conv-{tokens}x{key_heads}x{key_dim}+{values}" + (f"/{group}" if group > 1 else ""),
        lambda: dict(x_wide=randn(tokens, channels + 9), w=randn(channels, 4)),
        fused, reference,
        dict(
            q=Plant(kernel, "forward", of=0), k=Plant(kernel, "forward", of=1), v=Plant(kernel, "forward", of=2),
            dx=Plant(kernel, "backward", at=8), dw=Plant(kernel, "backward"),
        ),
    )  # fmt: skip


def gated_delta_case(
    lengths: list[int], key_heads: int, heads: int, key_dim: int, value_dim: int, *, chunks: bool = False
) -> Case:
    """A decays slowly (about .05), so that what leaks from one document into the next is seen.

    chunks: the reference goes chunk by chunk, which is the recurrence in another order, and quick.
    """
    tokens = sum(lengths)

    def views(t: Tensors) -> dict[str, torch.Tensor]:
        gates_wide = t["gates_wide"]
        return dict(
            q=unit(t["q"]), k=unit(t["k"]), v=t["v"], a=gates_wide[:, 1 : 1 + heads], b=gates_wide[:, 1 + heads : -1],
            log_a=t["log_a"], bias=t["bias"],
        )  # fmt: skip

    def fused(t: Tensors) -> Tensors:
        inputs, packed = views(t), documents(lengths, t["q"].device)
        o, saved = gated_delta.forward(*inputs.values(), packed)
        d = blank(t["gates_wide"])
        da, db = d[:, 1 : 1 + heads], d[:, 1 + heads : -1]
        do = output_gradient(o.shape, t["v"])
        dq, dk, dk2, dv, rates = gated_delta.backward(do, *inputs.values(), saved, packed, da, db, True)
        dk = dk if dk2 is None else dk.float() + dk2.float()
        dq, dk = (x.unflatten(1, (key_heads, -1)).sum(2, dtype=torch.float32) for x in (dq, dk))
        assert d[:, 0].isnan().all()
        assert d[:, -1].isnan().all()
        return dict(o=o, dq=dq, dk=dk, dv=dv, da=da, db=db, dlog_a=rates[0], dbias=rates[1])

    def reference(t: Tensors) -> Tensors:
        inputs = views(t)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
            if chunks:
                return gated_delta_reference(q, k, v, *rest.values(), lengths)
            decay, beta = gates(rest["a"], rest["b"], rest["log_a"], rest["bias"])
            q, k = (x.float().repeat_interleave(heads // key_heads, dim=1) for x in (q, k))
            parts = zip(*(x.split(lengths) for x in (q, k, v.float(), decay, beta)), strict=True)
            return torch.cat([recurrence(*part) for part in parts]).to(v.dtype)

        names = dict(q="dq", k="dk", v="dv", a="da", b="db", log_a="dlog_a", bias="dbias")
        return autograd(call, inputs, ("o",), (output_gradient(t["v"].shape, t["v"]),), names)

    gates_kernel, rule = "gated_delta.kernel", "gated_delta.fla_rule"
    return Case(
        f"gated_delta-{tokens}x{key_heads}/{heads}x{key_dim}x{value_dim}",
        lambda: dict(
            q=randn(tokens, key_heads, key_dim), k=randn(tokens, key_heads, key_dim), v=randn(tokens, heads, value_dim),
            gates_wide=randn(tokens, 2 * heads + 2), log_a=randn(heads, std=0.3) - 3.0, bias=randn(heads, std=0.3),
        ),
        fused, reference,
        dict(
            o=Plant(rule, "forward", of=0), dq=Plant(rule, "backward", of=0), dk=Plant(rule, "backward", of=1),
            dv=Plant(rule, "backward", of=3), da=Plant(gates_kernel, "backward", at=8),
            db=Plant(gates_kernel, "backward", at=9), dlog_a=Plant(gates_kernel, "backward", of=0),
            dbias=Plant(gates_kernel, "backward", of=1),
        ),
        fixed=("log_a", "bias"),
    )  # fmt: skip


def small() -> list[Case]:
    """For the interpreter: real head dims, small widths, odd lengths. The first of each operator is quick."""
    return [
        rms_norm_case(5, 32, 1.0), rms_norm_case(1, 32, 1.0), rms_norm_case(63, 100, 0.0), rms_norm_case(75, 257, 1.0),
        silu_mul_case(5, 75), silu_mul_case(63, 75), silu_mul_case(5, 1500),
        sigmoid_gate_case(5, 2, 64), sigmoid_gate_case(75, 3, 64), sigmoid_gate_case(5, 5, 256),
        gated_norm_case(5, 2, 64), gated_norm_case(75, 3, 128), gated_norm_case(1, 2, 64),
        rope_case(5, 3, 2, 64, 32, offset=1.0, gated=True, normed=True),
        rope_case(63, 2, 1, 256, 64, offset=1.0, gated=True, normed=True),
        rope_case(5, 3, 1, 128, 128, offset=0.0, gated=False, normed=True),
        rope_case(7, 4, 2, 64, 64, offset=0.0, gated=False, normed=False),
        attention_case([5, 40], 2, 1, 64), attention_case([1], 2, 1, 64), attention_case([5, 75, 63, 1], 4, 2, 64),
        attention_case([100, 70], 2, 1, 128, 20), attention_case([70, 40], 2, 1, 256),
        attention_case([100], 2, 2, 64, 64), attention_case([5, 40], 2, 1, 64, 39),
        causal_conv_case([5, 2], 1, 16, 24), causal_conv_case([1], 1, 128, 64),
        causal_conv_case([5, 63, 2, 1, 30], 2, 64, 200), causal_conv_case([40, 3], 1, 16, 48, group=3),
        gated_delta_case([3, 66], 1, 1, 64, 64), gated_delta_case([1], 1, 1, 64, 64),
        gated_delta_case([5, 75, 64, 1], 1, 2, 64, 64), gated_delta_case([70, 33], 1, 1, 128, 128),
        matmul_case(5, 33, 7), matmul_case(75, 200, 130), matmul_case(1, 64, 64), matmul_case(1400, 16, 1300),
        matmul_case(75, 24, 72),
        cross_entropy_case(3, 32, 100, 1024), cross_entropy_case(75, 32, 5003, 32),
        draft_attention_case([5, 9], 2, 1, 64, 2), draft_attention_case([33, 1, 70], 4, 2, 64, 3),
        draft_attention_case([20], 2, 2, 256, 3), draft_attention_case([33, 1, 70], 4, 2, 64, 3, every=3),
        draft_attention_case([5, 9], 2, 1, 64, 1, every=2),
        distillation_case(3, 32, 100, 1024), distillation_case(40, 32, 5003, 16),
    ]  # fmt: skip


def full_size(shape: Shape, lengths: list[int]) -> list[Case]:
    """For a GPU: the operators of one model at its widths."""
    tokens, heads, kv_heads, dim = sum(lengths), shape.heads, shape.kv_heads, shape.head_dim
    offset = 1.0 if shape.gated else 0.0
    cases = [
        rms_norm_case(tokens, shape.hidden, offset), silu_mul_case(tokens, shape.ffn),
        rope_case(
            tokens, heads, kv_heads, dim, shape.rotated, offset=offset, gated=shape.gated, normed=shape.normed
        ),
        attention_case(lengths, heads, kv_heads, dim, 100 if shape.window else None),
        matmul_case(tokens, shape.hidden, shape.ffn), cross_entropy_case(67, shape.hidden, VOCABULARY, 50),
    ]  # fmt: skip
    if shape.key_heads:
        values = shape.value_heads * shape.delta_dim
        cases += [
            draft_attention_case(lengths, heads, kv_heads, dim, 3),
            draft_attention_case(lengths, heads, kv_heads, dim, 3, every=3),
            distillation_case(67, shape.hidden, VOCABULARY, 50),
            sigmoid_gate_case(tokens, heads, dim), gated_norm_case(tokens, shape.value_heads, shape.delta_dim),
            causal_conv_case(
                lengths, shape.key_heads, shape.delta_dim, values, group=shape.value_heads // shape.key_heads
            ),
            gated_delta_case(
                lengths, shape.key_heads, shape.value_heads, shape.delta_dim, shape.delta_dim, chunks=True
            ),
        ]  # fmt: skip
    return cases
