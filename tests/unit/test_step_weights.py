"""What a label weighs in an optimiser step, beside plain autograd over all of the step's documents at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import ready
import torch
from looping import Bigrams, Training

from sparkctl.train.optim import Optimizer, learning_rate


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_label_of_a_step_weighs_alike(tmp_path: Path, accumulation: int) -> None:
    """In packs of unequal labels: the mean over a step's labels, not the mean of its packs' means."""
    plan = ready.plan(
        learning_rate=0.3, pack_length=64, gradient_accumulation=accumulation, tokens_per_step=64 * accumulation,
        max_steps=5, max_grad_norm=0.05,
    )  # fmt: skip
    training, plain = Training(tmp_path, plan=plan), Bigrams()
    optimizer = Optimizer(plain.parameters(), plan)
    losses, norms, apart = {}, {}, 0.0
    for step in range(plan.max_steps):
        packs = training.schedule.step(step)
        assert len(packs) == accumulation
        labels = [pack.labels for pack in packs]
        apart = max(apart, max(labels) / min(labels))
        loss = torch.stack([plain._loss(pack) for pack in packs]).sum() / sum(labels)
        loss.backward()
        losses[step + 1], norms[step + 1] = float(loss), float(optimizer.clip())
        optimizer.step(learning_rate(plan, step, training.schedule.steps))
    assert accumulation == 1 or apart > 1.2
    training.run()
    assert training.lines("loss") == pytest.approx(losses, rel=1e-6)
    assert training.lines("grad_norm") == pytest.approx(norms, rel=1e-5)  # observed 2e-7
    assert torch.allclose(training.engine.table, plain.table, atol=1e-5)
