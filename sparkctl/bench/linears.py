"""Matrix products, for `bench kernels`: layers with adapters and whole ones, this project's kernel, the head's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkctl.bench.subjects import BF16, Sizes, Subject, graded

if TYPE_CHECKING:
    import torch

    from sparkctl.bench.subjects import Run, Tensors

# T tokens · D hidden · F FFN · R rank · L label tokens · V vocabulary
FP32 = 4


def lora_linear(z: Sizes) -> Subject:
    """gate and up with their adapters: forward, input gradient, gradients of the adapters."""
    return _gate_up(z, "lora_linear", z.rank)


def full_linear(z: Sizes) -> Subject:
    """gate and up trained whole: forward, input gradient, gradient of the weights in fp32."""
    return _gate_up(z, "full_linear", 0)


def _gate_up(z: Sizes, name: str, rank: int) -> Subject:
    import torch
    from sparkctl_kernels.lora_linear import choice
    from sparkctl_kernels.lora_linear.layer import Copies, Projection, SharedInputLinear
    from sparkctl_kernels.lora_linear.reference import lora_linear as reference

    parts = ("gate", "up")
    masters = [part + what for part in parts for what in (("_a", "_b") if rank else ("_w",))]
    shapes = {"_w": (z.ffn, z.hidden), "_a": (rank, z.hidden), "_b": (z.ffn, rank)}
    width = {"_w": z.hidden, "_a": z.hidden, "_b": max(rank, 1)}

    def inputs() -> Tensors:
        weights = {part + what: shapes[what] for part in parts for what in (("_w", "_a", "_b") if rank else ("_w",))}
        found = {n: t * width[n[-2:]] ** -0.5 for n, t in z.random(**weights).items()}
        return found | z.random(x=(z.tokens, z.hidden), dy=(z.tokens, 2 * z.ffn))

    def ours(t: Tensors) -> Run:
        owned = {n: torch.nn.Parameter(t[n].float()) for n in masters}

        def projection(part: str) -> Projection:
            weight, a, b = owned.get(part + "_w", t[part + "_w"]), owned.get(part + "_a"), owned.get(part + "_b")
            return Projection(weight, None, a, b, trained=not rank)

        layer = SharedInputLinear(tuple(projection(part) for part in parts), 1.0, t["x"].dtype)
        with torch.no_grad():
            Copies(list(layer.copies())).round()

        @torch.no_grad()
        def run() -> Tensors:
            wide = layer.buffer(z.tokens)
            wide[:, : z.hidden] = t["x"]
            y, u = layer.forward(wide)
            dx, du = layer.input_gradient(t["dy"])
            layer.add_weight_gradients(t["dy"], t["x"], u, du)
            return dict(y=y, dx=dx[:, : z.hidden]) | {f"d{n}": p.grad for n, p in owned.items() if p.grad is not None}

        return run

    def eager(t: Tensors) -> Run:
        def call(x: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            outputs = [
                reference(x, given[p + "_w"], None, given.get(p + "_a"), given.get(p + "_b"), 1.0) for p in parts
            ]
            return torch.cat(outputs, dim=1)

        given = {n: tensor for n, tensor in t.items() if n != "dy"}
        return graded(call, given, ("y",), (t["dy"],), {"x": "dx"} | {n: f"d{n}" for n in masters})

    out, tokens = 2 * z.ffn, z.tokens
    if rank:
        both = 2 * rank
        products = 4 * (z.hidden + both) * out + 6 * z.hidden * both + 2 * out * rank
    else:
        products = 6 * z.hidden * out
    return Subject(
        name, choice(z.device).kernel, inputs, ours, eager,
        bytes=BF16 * (tokens * (4 * z.hidden + 3 * out) + 2 * z.hidden * out) + (0 if rank else FP32 * z.hidden * out),
        operations=tokens * products,
    )  # fmt: skip


def matmul(z: Sizes) -> Subject:
    """down_proj's three products by this project's kernel, which training takes only where it was measured faster."""
    import torch
    from sparkctl_kernels import gemm
    from sparkctl_kernels.matmul import op

    x, w, dy = (z.tokens, z.ffn), (z.hidden, z.ffn), (z.tokens, z.hidden)

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            y, dx = torch.empty_like(t["dy"]), torch.empty_like(t["x"])
            op.forward(t["x"], t["w"].T, y)
            op.forward(t["dy"], t["w"], dx)
            op.forward(t["dy"].T, t["x"], t["dw"], add=True)
            return dict(y=y, dx=dx, dw=t["dw"])

        return run

    def eager(t: Tensors) -> Run:
        def run() -> Tensors:
            y, dx = t["x"] @ t["w"].T, t["dy"] @ t["w"]
            gemm.by_torch(t["dy"].T, t["x"], t["dw"], add=True)
            return dict(y=y, dx=dx, dw=t["dw"])

        return run

    return Subject(
        "matmul", op.choice(z.device).kernel, lambda: z.random(x=x, w=w, dy=dy, dw=w), ours, eager,
        bytes=BF16 * (z.tokens * 3 * (z.ffn + z.hidden) + 2 * z.ffn * z.hidden) + 2 * FP32 * z.ffn * z.hidden,
        operations=6 * z.tokens * z.ffn * z.hidden, fixed=frozenset({"dw"}),
    )  # fmt: skip


def linear_cross_entropy(z: Sizes) -> Subject:
    """On label tokens; the head is frozen, so the hidden rows' gradient is all there is."""
    import torch
    from sparkctl_kernels.linear_cross_entropy import op
    from sparkctl_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

    rows = (z.labels, z.hidden)
    labels = torch.randint(z.vocabulary, (z.labels,), generator=torch.Generator().manual_seed(3)).to(z.device)

    def inputs() -> Tensors:
        t = z.random(hidden=rows, weight=(z.vocabulary, z.hidden))
        return t | dict(weight=t["weight"] * (2 * z.hidden**-0.5))

    def ours(t: Tensors) -> Run:
        def run() -> Tensors:
            dhidden = torch.empty_like(t["hidden"])
            loss = op.forward(t["hidden"], t["weight"], labels, 1.0, dhidden_ND=dhidden)
            return dict(loss=loss, dhidden=dhidden)

        return run

    def eager(t: Tensors) -> Run:
        def call(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return reference(hidden, weight, labels)

        one = torch.ones((), device=z.device)
        return graded(call, dict(hidden=t["hidden"], weight=t["weight"]), ("loss",), (one,), dict(hidden="dhidden"))

    return Subject(
        "linear_cross_entropy", op.choice(z.device).kernel, inputs, ours, eager,
        bytes=BF16 * (2 * z.vocabulary * z.hidden + 2 * z.labels * z.hidden + 4 * z.labels * z.vocabulary),
        operations=4 * z.labels * z.vocabulary * z.hidden,
    )  # fmt: skip
