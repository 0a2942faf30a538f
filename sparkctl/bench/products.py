"""`bench products`: each matrix product of a training step by every way to compute it, the fastest right one kept.

A training that starts on this machine later, of the model or of its MTP head, takes what is kept for it, and pins it;
without this command it takes torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sparkctl.bench.heads import stacks_of
from sparkctl.bench.setting import Setting
from sparkctl.bench.workload import Workload
from sparkctl.hardware.measurements import Layers, keep_ways
from sparkctl.manifest.store import now
from sparkctl.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from sparkctl_kernels.gemm import Product
    from sparkctl_kernels.ways import Timed


@dataclass(frozen=True)
class Row:
    """One product of the step. operations: multiplications and additions."""

    name: str
    operations: float
    timed: Timed

    @property
    def speedup(self) -> float:
        """Of the best way over torch's."""
        return self.timed.seconds["torch"] / self.timed.seconds[self.timed.best]


def bench_products(
    at: Setting, *, keep: bool = True, tell: Callable[[Row], None] | None = None, progress: Progress = silent
) -> tuple[list[Row], bool]:
    """(the products of a step, whether the choice was kept). A CPU has torch's way alone: no rows.

    tell: hears of each product once it is measured. The choice is kept when all are: one that was interrupted would
    leave trainings with the products of half a step.
    """
    import torch

    if at.machine.device == "cpu":
        return [], False
    progress.say(f"measuring the products of {at.name} at {at.work.tokens:,} tokens")
    rows, layers = measure(one_of_each(at.work), torch.device(at.machine.device), tell=tell)
    chosen = {row.name: row.timed.best for row in rows}
    return rows, keep and keep_ways(at.machine, layers, chosen, now())


def measure(
    work: Workload, device: torch.device, seconds: Callable[[Callable[[], None]], float] | None = None,
    tell: Callable[[Row], None] | None = None,
) -> tuple[list[Row], Layers]:  # fmt: skip
    """The products of a micro-step as the native engine computes it. seconds: a clock other than the GPU's own."""
    from sparkctl_kernels import ways

    stack, rows = stacks_of(work)["native"](work, device), list[Row]()

    def heard(key: Product, timed: Timed) -> None:
        rows.append(Row(str(key), 2.0 * key.rows * key.columns * key.depth, timed))
        if tell:
            tell(rows[-1])

    with ways.measuring(seconds, heard):
        stack.step()
    config = SimpleNamespace(**{**work.config, **work.text})
    return rows, Layers.of(config, work.rank if work.lora else 0, head=bool(work.draft_steps))


def one_of_each(work: Workload) -> Workload:
    """The workload with as few layers as show every kind: three GatedDeltaNet and one of attention, or one."""
    text: dict[str, Any] = dict(work.text)
    kinds = text.get("layer_types")
    count = max(kinds.index(kind) for kind in set(kinds)) + 1 if kinds else text.get("full_attention_interval", 1)
    text["num_hidden_layers"] = count
    if kinds:
        text["layer_types"] = kinds[:count]
    return replace(work, config={**work.config, "text_config": text} if "text_config" in work.config else text)
