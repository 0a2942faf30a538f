"""Gradients of engines over the same packs, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ready
import torch

from sparkctl.data.batches import Document, Pack
from sparkctl.data.tokens import label_count
from sparkctl.train.engines.base import Engine

EXACT = 2e-5  # relative, fp32: another order of sums; observed up to 5e-6


def pack(*documents: tuple[np.ndarray, np.ndarray]) -> Pack:
    made = [Document(i, ids, trained) for i, (ids, trained) in enumerate(documents)]
    return Pack(made, sum(len(d.ids) for d in made), sum(label_count(d.trained) for d in made))


def engine(
    load: Callable[..., Engine], folder: Path, *, dtype: torch.dtype = torch.float32, std: float = 0.25,
    **changes: object,
) -> Any:  # fmt: skip
    """One whose adapters are not zero, so that every gradient is there."""
    made = load(ready.plan(engine="native", **changes), folder, {}, dtype)
    if "mode" not in changes:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.parameters().values():
                parameter.normal_(std=std, generator=generator)
    return made


def gradients(made: Engine, packs: list[Pack]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss a token and gradients of one optimiser step over these packs."""
    for parameter in made.parameters().values():
        parameter.grad = None
    labels = sum(pack.labels for pack in packs)
    loss = sum(float(made.micro_step(pack, 1 / labels)) for pack in packs) / labels
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in made.parameters().items()}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    return loss, found


def distances(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    assert list(a) == list(b)
    return {n: float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-6)) for n in a}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(distances(a, b).values())
