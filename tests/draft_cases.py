"""Cases of what the MTP head is trained with: attention with keys of a row's own, distillation through the head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_cases import Case, Plant, Tensors, autograd, output_gradient, randn
from sparkctl_kernels.attention.drafts import draft_attention
from sparkctl_kernels.attention.reference import Pair
from sparkctl_kernels.attention.reference import draft_attention as draft_attention_reference
from sparkctl_kernels.distillation import op as distillation
from sparkctl_kernels.distillation.reference import divergence
from sparkctl_kernels.documents import documents

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[Pair]], torch.Tensor]


def draft_attention_case(lengths: list[int], heads: int, kv_heads: int, dim: int, steps: int, every: int = 1) -> Case:
    """Attention of draft `steps`: to the first's keys and to steps - 1 of its own row. every: so many rows apart stand
    those that draft; the reference computes all.
    """
    tokens = sum(lengths)
    drafting = -(-tokens // every)
    names = ["q", "k", "v"] + [f"{kind}{step}" for step in range(2, steps + 1) for kind in "kv"]

    def inputs() -> Tensors:
        sizes = {name: tokens if name in "kv" else drafting for name in names}
        return {name: randn(size, heads if name == "q" else kv_heads, dim) for name, size in sizes.items()}

    def own(t: Tensors) -> list[Pair]:
        return [(t[f"k{step}"], t[f"v{step}"]) for step in range(2, steps + 1)]

    def compare(call: Call) -> Callable[[Tensors], Tensors]:
        def run(t: Tensors) -> Tensors:
            return autograd(
                lambda **t: call(t["q"], t["k"], t["v"], own(t)), t, ("o",), (output_gradient(t["q"].shape, t["q"]),),
                {name: f"d{name}" for name in names},
            )  # fmt: skip

        return run

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: list[Pair]) -> torch.Tensor:
        rows = torch.arange(0, tokens, every, device=q.device) if every > 1 else None
        return draft_attention(q, k, v, own, documents(lengths, q.device), rows)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: list[Pair]) -> torch.Tensor:
        def spread(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(every, 0)[:tokens]

        own = [(spread(k), spread(v)) for k, v in own]
        return draft_attention_reference(spread(q), k, v, own, lengths)[::every]

    kernel = "attention.op"
    return Case(
        f"draft_attention-{tokens}x{heads}/{kv_heads}x{dim}-{steps}" + (f"/{every}" if every > 1 else ""),
        inputs, compare(fused), compare(reference),
        dict(
            o=Plant(kernel, "forward", of=0), dq=Plant(kernel, "backward", of=0), dk=Plant(kernel, "backward", of=1),
            dv=Plant(kernel, "backward", at=4),
            **{
                f"d{kind}{n}": Plant("attention.kernel", "own_backward_", of=of)
                for n in range(2, steps + 1) for of, kind in enumerate("kv")
            },
        ),
    )  # fmt: skip


def distillation_case(rows: int, width: int, vocabulary: int, chunk: int) -> Case:
    """Two students of a teacher, the second without a row for the first target."""
    scale, weights = 0.25, (1.0, 0.6)

    def of(number: int, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(rows, device=t["teacher"].device)
        return (at - number).clamp_min(0), (at >= number).float()

    def fused(t: Tensors) -> Tensors:
        states, gradients = [t["first"], t["second"]], [torch.zeros_like(t["first"]), torch.zeros_like(t["second"])]
        students = [distillation.Student(states[n], *of(n, t), weights[n], gradients[n]) for n in range(len(states))]
        losses = distillation.forward(t["teacher"], t["weight"], students, scale, chunk)
        alone = distillation.forward(t["teacher"], t["weight"], [s._replace(gradient=None) for s in students], 1.0)
        assert torch.allclose(losses, alone, rtol=1e-5)
        return dict(first_loss=losses[0], second_loss=losses[1], dfirst=gradients[0], dsecond=gradients[1])

    def reference(t: Tensors) -> Tensors:
        def losses(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = []
            for number, states in enumerate((first, second)):
                at, present = of(number, t)
                found.append((divergence(states[at], t["teacher"], t["weight"]) * present).sum())
            return found[0], found[1]

        return autograd(
            losses, dict(first=t["first"], second=t["second"]), ("first_loss", "second_loss"),
            tuple(torch.tensor(scale * weight, device=t["first"].device) for weight in weights),
            dict(first="dfirst", second="dsecond"),
        )  # fmt: skip

    kernel = "distillation.kernel"
    return Case(
        f"distillation-{rows}x{width}x{vocabulary}/{chunk}",
        lambda: dict(
            teacher=randn(rows, width), first=randn(rows, width), second=randn(rows, width),
            weight=randn(vocabulary, width, std=2 * width**-0.5),
        ),
        fused, reference,
        dict(
            first_loss=Plant(kernel, "divergence_", at=4), second_loss=Plant(kernel, "divergence_", at=4),
            dfirst=Plant(kernel, "divergence_", at=0), dsecond=Plant(kernel, "divergence_", at=0),
        ),
    )  # fmt: skip
