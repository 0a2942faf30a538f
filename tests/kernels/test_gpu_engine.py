"""On a GPU: linear layers with adapters at every size, the whole model beside the reference, and a resumed training.

Errors are against fp32, and may be twice those of the eager bf16 that a layer or the engine stands for.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from gpu_runs import MACHINE, outcome, with_head
from gradient_cases import gradients, pack
from kernel_cases import Tensors, distances
from sparkctl_kernels.lora_linear.layer import Copies, Projection, SharedInputLinear
from sparkctl_kernels.lora_linear.reference import lora_linear
from sparkctl_kernels.shapes import QWEN35, Shape
from striking import at_step
from torch import nn

from sparkctl.errors import Interrupted
from sparkctl.manifest.store import Run
from sparkctl.steps.resume import resume
from sparkctl.steps.train import train
from sparkctl.train.engines import reference
from sparkctl.train.engines.native import engine as native
from sparkctl.verify.gradients import Distance, add_distances, fill_adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # the first call of the library's kernels tunes them
]

GPU = torch.device("cuda")
TOKENS, SCALE = 1283, 0.5
SLACK = 1e-4  # of a norm: an eager result may be exact by chance
OF_A_LOSS = 1e-3  # whose errors cancel by chance, in either engine
PACKS = 4


def groups(shape: Shape) -> Iterator[tuple[str, int, list[int]]]:
    """(name, input width, output widths) of the layers whose projections share an input."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    values = shape.value_heads * shape.delta_dim
    yield "qkv", shape.hidden, [2 * query, key, key]
    yield "o", query, [shape.hidden]
    yield "delta", shape.hidden, [2 * shape.key_heads * shape.delta_dim + values, values]
    yield "gate_up", shape.hidden, [shape.ffn, shape.ffn]
    yield "down", shape.ffn, [shape.hidden]


class Layer:
    """Masters and an input of one layer, and the ways to compute it. rank: of each projection's adapter; 0: whole."""

    def __init__(self, width: int, outputs: list[int], rank: int) -> None:
        torch.manual_seed(0)
        self.width, self.whole = width, not rank
        dtype = torch.float32 if self.whole else torch.bfloat16
        self.x = torch.randn(TOKENS, width, device=GPU).bfloat16()
        self.dy = torch.randn(TOKENS, sum(outputs), device=GPU).bfloat16()
        self.weights = [(torch.randn(n, width, device=GPU) * width**-0.5).to(dtype) for n in outputs]
        self.a = [torch.randn(rank, width, device=GPU) * width**-0.5 for _ in outputs if rank]
        self.b = [torch.randn(n, rank, device=GPU) * rank**-0.5 for n in outputs if rank]

    def eager(self, dtype: torch.dtype) -> Tensors:
        """By autograd: adapters as peft computes them."""
        x = self.x.to(dtype).requires_grad_()
        weights = [w.clone().requires_grad_(self.whole) for w in self.weights]
        a, b = ([m.clone().requires_grad_() for m in masters] for masters in (self.a, self.b))
        adapters = zip(a, b, strict=True) if a else [(None, None)] * len(weights)
        y = torch.cat(
            [lora_linear(x, w.to(dtype), None, *pair, SCALE) for w, pair in zip(weights, adapters, strict=True)], dim=1
        )
        y.backward(self.dy.to(dtype))
        return self._results(y.detach(), x.grad, weights if self.whole else [*a, *b])

    def ours(self) -> Tensors:
        """As the engine calls the layer."""
        weights = [nn.Parameter(w.clone(), requires_grad=self.whole) for w in self.weights]
        a, b = ([nn.Parameter(m.clone()) for m in masters] for masters in (self.a, self.b))
        adapters = zip(a, b, strict=True) if a else [(None, None)] * len(weights)
        projections = tuple(Projection(w, None, *pair, self.whole) for w, pair in zip(weights, adapters, strict=True))
        layer = SharedInputLinear(projections, SCALE, torch.bfloat16)
        with torch.no_grad():
            Copies(list(layer.copies())).round()
            wide = layer.buffer(TOKENS).fill_(float("nan"))
            wide[:, : self.width] = self.x
            y, u = layer.forward(wide)
            dx, du = layer.input_gradient(self.dy)
            layer.add_weight_gradients(self.dy, wide[:, : self.width], u, du)
        return self._results(y, dx[:, : self.width], weights if self.whole else [*a, *b])

    @staticmethod
    def _results(y: torch.Tensor, dx: torch.Tensor | None, masters: list[Any]) -> Tensors:
        assert dx is not None
        assert all(master.grad is not None for master in masters)
        return {"y": y.float(), "dx": dx.float()} | {f"master {i}": m.grad.float() for i, m in enumerate(masters)}


@pytest.mark.parametrize("rank", [128, 8, 0], ids=["rank128", "rank8", "whole"])
@pytest.mark.parametrize("shape", QWEN35, ids=lambda shape: shape.name)
def test_linear_layers_are_no_further_from_fp32_than_twice_eager(shape: Shape, rank: int) -> None:
    for name, width, outputs in groups(shape):
        layer = Layer(width, outputs, rank)
        truth = layer.eager(torch.float32)
        limits = {n: 2 * error + SLACK for n, error in distances(layer.eager(torch.bfloat16), truth).items()}
        errors = distances(layer.ours(), truth)
        assert len(errors) == 2 + len(outputs) * (2 if rank else 1)
        assert all(errors[n] <= limits[n] for n in errors), (name, errors, limits)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_whole_model_is_no_further_from_fp32_than_twice_the_reference(mode: str, wide_qwen35: Path) -> None:
    """Losses and the gradient of every trained tensor, GatedDeltaNet of the reference in plain torch."""
    plan = ready.plan(engine="native", mode=mode, pack_length=2048, machine=MACHINE)
    truth = reference.load(plan, wide_qwen35, {}, torch.float32, plain=True)
    engines: list[Any] = [reference.load(plan, wide_qwen35, {}, plain=True), native.load(plan, wide_qwen35, {})]
    for made in (truth, *engines):
        fill_adapters(made.parameters(), plan.seed)
    found: list[dict[str, Distance]] = [{}, {}]
    losses: list[list[float]] = [[], []]
    for seed in range(PACKS):
        packs = [pack(*ready.documents(6, longest=300, seed=seed))]
        loss, true = gradients(truth, packs)
        for made, distance, off in zip(engines, found, losses, strict=True):
            off.append(abs(gradients(made, packs)[0] - loss) / loss)
            add_distances(distance, made, true)
    theirs, ours = found
    assert {name for distance in ours.values() for name in distance.tensors} == set(truth.parameters())
    limits = {name: 2 * distance.relative + SLACK for name, distance in theirs.items()}
    errors = {name: distance.relative for name, distance in ours.items()}
    assert all(errors[name] <= limits[name] for name in limits), (errors, limits)
    assert max(losses[1]) <= 2 * max(losses[0]) + OF_A_LOSS, losses


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_resumed_training_is_the_one_left_alone_to_the_bit(
    tmp_path: Path, wide_qwen35: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    model = with_head(wide_qwen35, tmp_path / "model")
    straight, run = (
        ready.run(tmp_path / name, model, count=24, engine="native", mode=mode, machine=MACHINE) for name in "ab"
    )
    train(straight.root)
    losses = [line["loss"] for line in outcome(straight)[0] if "loss" in line]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        at_step(patch, native.NativeEngine, 7, lambda engine: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run.root)
    stopped = Run.open(run.root).manifest.train
    assert stopped is not None
    assert 0 < stopped.step < 4
    resume(run.root)
    assert outcome(run) == outcome(straight)
    assert any(name.startswith("chunk_") for name in outcome(run)[2])  # the tiles of the delta rule
