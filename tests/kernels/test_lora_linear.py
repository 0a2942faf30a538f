"""The layer of projections that share an input against plain torch: outputs, every gradient, compute copies."""

from __future__ import annotations

import pytest
import torch
from sparkctl_kernels.lora_linear.layer import Copies, Projection, SharedInputLinear
from sparkctl_kernels.lora_linear.reference import lora_linear
from torch import nn

T, K = 37, 24
SCALE = 0.5
LIMIT = 2e-6  # relative, fp32; observed up to 4e-7


def projections(ranks: list[int], *, biased: bool = False, trained: bool = False) -> tuple[Projection, ...]:
    """Of widths 16, 8 and 3, with adapters of these ranks (0: none)."""
    made = []
    for width, rank in zip((16, 8, 3), ranks, strict=True):
        a, b = (nn.Parameter(torch.randn(shape)) for shape in ((rank, K), (width, rank)))
        weight, bias = torch.randn(width, K), torch.randn(width)
        if trained:
            weight, bias = nn.Parameter(weight), nn.Parameter(bias)
        made.append(
            Projection(weight, bias if biased else None, a if rank else None, b if rank else None, trained)
        )  # fmt: skip
    return tuple(made)


KINDS = {
    "adapters": dict(ranks=[4, 4, 4]),
    "some": dict(ranks=[4, 0, 8], biased=True),
    "frozen": dict(ranks=[0, 0, 0]),
    "whole": dict(ranks=[0, 0, 0], biased=True, trained=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str) -> None:
    torch.manual_seed(0)
    given = projections(**KINDS[kind])
    masters = [t for p in given for t in (p.weight, p.bias, p.lora_a, p.lora_b) if isinstance(t, nn.Parameter)]
    x = torch.randn(T, K, requires_grad=True)
    truth = torch.cat([lora_linear(x, p.weight, p.bias, p.lora_a, p.lora_b, SCALE) for p in given], dim=1)
    dy = torch.randn_like(truth)
    dx, *wanted = torch.autograd.grad(truth, [x, *masters], dy)

    layer = SharedInputLinear(given, SCALE, torch.float32)
    copies = Copies(list(layer.copies()))
    copies.round()
    with torch.no_grad():
        for times in (1, 2):  # the second micro-step adds
            wide = layer.buffer(T).fill_(float("nan"))
            wide[:, :K] = x
            y, u = layer.forward(wide)
            found, du = layer.input_gradient(dy)
            layer.add_weight_gradients(dy, x, u, du)
            assert close(y, truth)
            assert close(found[:, :K], dx)
            assert all(close(m.grad, times * g) for m, g in zip(masters, wanted, strict=True))
        for master in masters:
            master.grad = None
        layer.add_weight_gradients(dy, x, u, du)
        assert all(close(m.grad, g) for m, g in zip(masters, wanted, strict=True))
        for master in masters:
            master.mul_(1.5)
        copies.round()
        changed = torch.cat([lora_linear(x, p.weight, p.bias, p.lora_a, p.lora_b, SCALE) for p in given], dim=1)
        wide[:, :K] = x
        assert close(layer.forward(wide)[0], changed)
        assert not masters or not close(changed, truth)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= LIMIT * float(b.norm())


def test_frozen_weights_become_views_of_the_one_matrix() -> None:
    given = projections([4, 0, 0])
    before = [p.weight.clone() for p in given]
    layer = SharedInputLinear(given, SCALE, torch.float32)
    storage = layer.weight.untyped_storage().data_ptr()
    assert all(p.weight.untyped_storage().data_ptr() == storage for p in given)
    assert all(torch.equal(p.weight, w) for p, w in zip(given, before, strict=True))
