"""Whether documents of a pack see each other: one is changed, and what belongs to the others has to stay, to the bit.

Three documents, the one in the middle without labels: whatever its tokens are, the loss and every gradient are the
other two's. The same three joined into one document must differ, or the check could not see a leak at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.data.batches import Document, Pack
from sparkctl.data.tokens import label_count
from sparkctl.manifest.schema import Machine
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.progress import Progress
from sparkctl.train.engines import make_engine
from sparkctl.verify.bits import apart
from sparkctl.verify.gradients import fill_adapters
from sparkctl.verify.small import SIZES, parts_of, plan_for, write_model

if TYPE_CHECKING:
    import torch

    from sparkctl.train.engines.base import Engine

LENGTHS = (70, 75, 67)  # past a chunk of 64, ends unaligned
NOISE = 10.0  # times what an engine differs from itself: where it does not repeat itself, bits prove nothing
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Finding:
    """What leaked where. Sizes are relative differences, 0 where every bit is the same.

    leak: of the other documents' numbers when one changes. noise: the same when nothing changes. planted: when the
    documents are joined; None where none was planted. judged: whether a leak here is ours, and fails the check.
    refused: why it was not computed.
    """

    subject: str
    part: str
    leak: float = 0.0
    noise: float = 0.0
    planted: float | None = None
    judged: bool = True
    refused: str | None = None

    @property
    def leaks(self) -> bool:
        """Whether more changed than changes by itself."""
        return not self.leak <= NOISE * self.noise

    @property
    def blind(self) -> bool:
        """Whether a planted leak was not seen."""
        return self.planted is not None and not self.planted > NOISE * self.noise

    @property
    def failed(self) -> bool:
        """Whether the check fails for it."""
        return self.judged and self.refused is None and (self.leaks or self.blind)


def engine_leaks(
    config: dict[str, Any], engine: EngineName, mode: Mode, machine: Machine, progress: Progress, *,
    allow_slow: bool = False, name: str = "RUN",
) -> list[Finding]:  # fmt: skip
    """An engine on small models of config.json's architecture, part by part."""
    found, plan = [], plan_for(engine, mode, machine)
    for part in parts_of(config):
        with tempfile.TemporaryDirectory(prefix="sparkctl-leaks-") as folder:
            write_model(Path(folder), config, part)
            made = make_engine(plan, Path(folder), name=name, allow_slow=allow_slow)
            fill_adapters(made.parameters(), seed=0)
            found.append(engine_leak(made, f"{engine} engine", part))
            progress.say(f"{engine} engine, {part}: {'LEAKS' if found[-1].leaks else 'tight'}")
    return found


def engine_leak(engine: Engine, subject: str, part: str) -> Finding:
    """One loaded engine."""
    kept, changed = three_documents()
    before, again, after = (_computed(engine, documents) for documents in (kept, kept, changed))
    joined = [_computed(engine, [_joined(documents)]) for documents in (kept, changed)]
    return Finding(
        subject, part, difference(before, after), difference(before, again), planted=difference(joined[0], joined[1])
    )


def three_documents() -> tuple[list[Document], list[Document]]:
    """(three documents, the same with another one in the middle); the one in the middle has no label."""
    random = np.random.RandomState(0)
    ids = [random.randint(0, SIZES["vocab_size"], length).astype(np.int32) for length in LENGTHS]
    trained = [np.full(length, i != 1) for i, length in enumerate(LENGTHS)]
    for mask in trained:
        mask[0] = False
    kept = [Document(i, ids[i], trained[i]) for i in range(3)]
    other = (ids[1] + 7) % SIZES["vocab_size"]
    return kept, [kept[0], Document(1, other.astype(np.int32), trained[1]), kept[2]]


def _joined(documents: Sequence[Document]) -> Document:
    """As one: what a computation without boundaries sees."""
    return Document(0, np.concatenate([d.ids for d in documents]), np.concatenate([d.trained for d in documents]))


def _computed(engine: Engine, documents: list[Document]) -> Tensors:
    """Loss in training and in evaluation, and every gradient, on the host."""
    import torch

    pack = Pack(documents, sum(len(d.ids) for d in documents), sum(label_count(d.trained) for d in documents))
    parameters = engine.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    loss = engine.micro_step(pack, 1 / pack.labels)
    found = {n: torch.zeros(p.shape) if p.grad is None else p.grad.to("cpu", copy=True) for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found | {"loss": loss.to("cpu", copy=True), "held-out loss": engine.eval_sum(pack).to("cpu", copy=True)}


def difference(a: Tensors, b: Tensors) -> float:
    """0 where all is equal to the bit, else the largest relative difference of a tensor, infinite at a NaN."""
    if a.keys() != b.keys():
        raise ValueError("two computations of one engine gave different tensors")
    return max((apart(a[name], b[name]) for name in a), default=0.0)
