from __future__ import annotations

from pathlib import Path

import pytest
import ready
import torch

from sparkctl.train.engines import reference
from sparkctl.train.optim import Optimizer, learning_rate


def test_warm_up_then_cosine_or_linear_to_the_share_that_is_left() -> None:
    plan = ready.plan(learning_rate=1.0, warmup_steps=4, min_lr_fraction=0.1, schedule="cosine")
    assert [learning_rate(plan, n, 24) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(plan, 14, 24) == pytest.approx(0.55)
    assert learning_rate(plan, 24, 24) == pytest.approx(0.1)
    linear = plan.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 9, 24) == pytest.approx(1 - 0.9 / 4)
    assert learning_rate(linear, 24, 24) == pytest.approx(0.1)
    assert all(learning_rate(plan, n, 24) > learning_rate(plan, n + 1, 24) for n in range(4, 24))
    assert learning_rate(plan.model_copy(update={"warmup_steps": 0}), 0, 24) == 1.0


def test_an_update_is_adamw_s_by_the_plan_s_numbers() -> None:
    """Kingma and Ba's moments, corrected for their start from zero; decay beside them (Loshchilov and Hutter)."""
    plan = ready.plan(beta1=0.8, beta2=0.95, epsilon=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    optimizer = Optimizer({"weight": weight}, plan)
    wanted, mean, square = weight.detach().double(), torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    for n, rate in enumerate((1e-2, 3e-2, 2e-2), start=1):
        weight.grad = torch.randn(5, 3, generator=generator)
        gradient = weight.grad.double()
        mean = plan.beta1 * mean + (1 - plan.beta1) * gradient
        square = plan.beta2 * square + (1 - plan.beta2) * gradient**2
        root = (square / (1 - plan.beta2**n)).sqrt() + plan.epsilon
        wanted = (1 - rate * plan.weight_decay) * wanted - rate * mean / (1 - plan.beta1**n) / root
        optimizer.step(rate)
        assert float((weight.detach() - wanted).abs().max()) < 1e-6  # observed 1.2e-7; 1 % of an update is 1e-4


def test_decay_falls_on_matrices_alone_and_gradients_are_clipped_to_the_norm() -> None:
    ones = {"matrix": torch.nn.Parameter(torch.ones(3, 4)), "vector": torch.nn.Parameter(torch.ones(4))}
    optimizer = Optimizer(ones, ready.plan(weight_decay=0.5, max_grad_norm=2.0))
    for parameter in ones.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    assert torch.equal(ones["vector"], torch.ones(4))
    assert torch.allclose(ones["matrix"], torch.full((3, 4), 0.95))
    for parameter in ones.values():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert float(optimizer.clip()) == pytest.approx(12.0)
    assert float(torch.linalg.vector_norm(ones["matrix"].grad)) == pytest.approx(2 * (12 / 16) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_thousand_updates_of_a_ten_thousandth_arrive(mode: str, qwen35_folder: Path) -> None:
    plan = ready.plan(mode=mode, weight_decay=0.0)
    masters = reference.load(plan, qwen35_folder, {}).parameters()
    lost = torch.ones(1, dtype=torch.bfloat16)
    with torch.no_grad():
        for master in masters.values():
            master.fill_(1.0)
    optimizer = Optimizer(masters, plan)
    for _ in range(1000):
        for master in masters.values():
            master.grad = torch.ones_like(master)
        optimizer.step(1e-4)
        lost -= 1e-4
    assert lost.item() == 1.0  # what bf16 weights would have kept of it
    for name, master in masters.items():
        assert torch.allclose(master, torch.full_like(master, 0.9), atol=1e-4), name


def test_moments_go_on_where_they_were() -> None:
    def train(optimizer: Optimizer, first: int, last: int) -> None:
        for n in range(first, last):
            generator = torch.Generator().manual_seed(n)
            for parameter in optimizer.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(1e-2)

    start = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    straight = Optimizer({name: torch.nn.Parameter(value.clone()) for name, value in start.items()}, ready.plan())
    train(straight, 0, 9)
    first = Optimizer({name: torch.nn.Parameter(value.clone()) for name, value in start.items()}, ready.plan())
    train(first, 0, 4)
    values = {name: torch.nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()}
    second = Optimizer(values, ready.plan())
    for (_, old), (_, new) in zip(first.moments(), second.moments(), strict=True):
        new.copy_(old)
    second.set_step(4)
    train(second, 4, 9)
    assert all(torch.equal(straight.parameters[name], second.parameters[name]) for name in start)
    second.set_step(3)
    train(second, 9, 10)
    train(straight, 9, 10)
    assert not torch.equal(straight.parameters["a"], second.parameters["a"])  # the count of updates matters
