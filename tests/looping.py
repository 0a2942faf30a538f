"""A training loop around an engine of one matrix, in a folder of its own: for the tests of what is handed to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ready
import torch

from sparkctl.data.batches import Pack, Schedule, eval_packs
from sparkctl.data.tokens import TokenStore
from sparkctl.train import metrics
from sparkctl.train.guard import Numbers, Signals
from sparkctl.train.loop import Loop
from sparkctl.train.optim import Optimizer, learning_rate
from sparkctl.train.ranks import Ranks
from sparkctl.train.state import State


class Bigrams:
    """Logits of the next token are a row of one fp32 table. `before` sees each pack before it is computed."""

    name = "bigrams"

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self.device = device
        self.table = torch.nn.Parameter(torch.zeros(ready.VOCABULARY, ready.VOCABULARY, device=device))
        self.before: Callable[[Pack], None] = lambda pack: None
        self.poison = 1.0

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"table": self.table}

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        self.before(pack)
        loss = self._loss(pack)
        (loss * scale).backward()
        return loss.detach()

    def eval_sum(self, pack: Pack) -> torch.Tensor:
        with torch.no_grad():
            return self._loss(pack)

    def describe(self) -> list[tuple[str, str]]:
        return []

    def choices(self) -> dict[str, str]:
        return {}

    def pin(self, choices: dict[str, str]) -> None:
        pass

    def _loss(self, pack: Pack) -> torch.Tensor:
        total = self.table.sum() * 0
        for document in pack.documents:
            ids, at = torch.from_numpy(document.ids.astype(np.int64)), np.flatnonzero(document.trained[1:])
            ids = ids.to(self.device)
            loss = torch.nn.functional.cross_entropy(self.table[ids[at]], ids[at + 1], reduction="sum")
            total = total + loss * self.poison
        return total


@dataclass
class Training:
    """A loop in a folder, and what it said of its checkpoints."""

    folder: Path
    engine: Bigrams = field(default_factory=Bigrams)
    plan: object = field(default_factory=ready.plan)
    ranks: Ranks = field(default_factory=Ranks)
    ahead: bool = False
    on_saved: Callable[[str], None] = lambda name: None
    saved: list[tuple[str, float | None, list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokens = self.folder / "tokens"
        self.store = TokenStore.open(tokens) if tokens.exists() else ready.store(tokens, ready.documents(40))
        plan = self.plan
        self.schedule = Schedule(
            self.store, pack_length=plan.pack_length, gradient_accumulation=plan.gradient_accumulation,
            epochs=plan.epochs, seed=plan.seed, max_steps=plan.max_steps,
        )  # fmt: skip
        self.optimizer = Optimizer(self.engine.parameters(), plan)
        self.signals = Signals("sparkctl resume r1", lambda text: None)
        self.numbers = Numbers(self.store.place, "lower the rate")
        self.state = State(mode="lora")
        self.held_out = eval_packs(self.store, plan.pack_length)

    def run(self) -> State:
        writes = self.ranks.writes
        loop = Loop(
            engine=self.engine,
            schedule=self.schedule,
            optimizer=self.optimizer,
            rate=lambda step: learning_rate(self.plan, step, self.schedule.steps),
            state=self.state,
            folder=self.folder / "checkpoints",
            save_every=self.plan.save_every,
            keep=self.plan.keep,
            held_out=self.held_out,
            metrics=metrics.Metrics(self.folder / "metrics.jsonl") if writes else None,
            numbers=self.numbers,
            signals=self.signals,
            saved=self._saved,
            ranks=self.ranks,
            ahead=self.ahead,
        )
        return loop.run()

    def _saved(self, path: Path, at: State, gone: list[str]) -> None:
        self.saved.append((path.name, at.eval_loss, gone))
        self.on_saved(path.name)

    def lines(self, key: str) -> dict[int, float]:
        return {line["step"]: line[key] for line in metrics.read(self.folder / "metrics.jsonl") if key in line}


def id_of(pack: Pack) -> tuple[int, ...]:
    """Its documents."""
    return tuple(document.id for document in pack.documents)
