"""The certificate: an engine's gradients and a short training, beside the reference's, each against the truth in fp32.

The truth is the reference engine with every product in fp32 (TF32 off), transformers' layers in plain torch. Three
questions are asked of an engine:
- precision: at step 0, is the gradient of every trained tensor at most RATIO times as far from the truth as that of the
  reference in bf16? The loss of single documents likewise.
- formula: computed in fp32, are its gradients the truth's? bf16 rounds a gradient by about 1 %, which would hide an
  error of that size in an operator. Asked of engines that compute in fp32 too; on a GPU the native one has attention
  and the delta rule by their references then and products by torch, whose kernels the first question is about.
- course: over some optimiser steps on the same data, do loss and gradient norm stay as near to the truth's course as
  the reference's do?

The reference (`judges`) and the engine (`judged`) are measured in processes of their own, one after the other: what
either patches or imports is none of the other's.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.data.batches import Document, Pack, Schedule
from sparkctl.data.tokens import label_count
from sparkctl.errors import NoMemory
from sparkctl.manifest.schema import PlanTable
from sparkctl.progress import Progress
from sparkctl.train import guard, random, state
from sparkctl.train.engines import ENGINES, import_first, make_engine
from sparkctl.train.optim import Optimizer, learning_rate
from sparkctl.verify.certificate import COURSE_RATIO, Certificate, Point, TensorRow, compared
from sparkctl.verify.gradients import Distance, Truth, add_distances, fill_adapters

if TYPE_CHECKING:
    import torch

    from sparkctl.train.engines.base import Engine

PACKS = 8  # at step 0; with 4 the worst of a tiny model's ratios passed 1.9 by chance, with 8 it stayed below 1.65
DOCUMENTS = 32  # whose losses are compared one by one: the ratio of two such errors passes 2 once in 10,000
TOKENS = 2048  # of a pack that is cut down
AREA = 4096  # tokens that the judges compute at once where no document is longer: they keep every logit
LOSS_FLOOR = 1e-4  # of the loss: a mean over a document's tokens is not told apart below
COURSE_LOSS_FLOOR, COURSE_NORM_FLOOR = 1e-3, 1e-2  # of loss and norm: so near, nobody could tell the trainings apart
IN_FP32 = {"native"}  # engines whose load() takes dtype


@dataclass(frozen=True)
class Setting:
    """What is computed. start: a checkpoint to begin with, else fresh masters. name: the run in hints. choices: those
    that the engine is pinned to, none: its own."""

    plan: PlanTable
    folder: Path
    packs: Sequence[Pack]  # of step 0
    course: Sequence[Pack]  # one an optimiser step
    start: Path | None = None
    name: str = "RUN"
    allow_slow: bool = False
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def documents(self) -> list[Pack]:
        """Single documents of the packs of step 0, the first pack's first, as packs of their own."""
        alone = (Pack([d], len(d.ids), label_count(d.trained)) for pack in self.packs for d in pack.documents)
        return [pack for pack in alone if pack.labels][:DOCUMENTS]


def chosen_packs(schedule: Schedule, steps: int) -> tuple[list[Pack], list[Pack]]:
    """(packs of step 0: the one around the longest document and the run's first; packs of a course of `steps`).

    All but the first are cut down to the documents that fill TOKENS: proofs need many packs, not large ones. A run of
    fewer than PACKS has the rest from them, each document's tokens in another order.
    """
    course: list[Pack] = []
    for n in range(schedule.steps):
        course += [pack for pack in map(_cut, schedule.step(n)) if pack.labels]
        if len(course) >= max(steps, PACKS):
            break
    first = schedule.around_longest()
    packs = [pack for pack in [first] if pack.labels]
    seen = {document.id for document in first.documents}
    for pack in course:
        if len(packs) < PACKS and not seen.intersection(document.id for document in pack.documents):
            packs.append(pack)
            seen.update(document.id for document in pack.documents)
    return _enough(packs or course[:1]), course[:steps]


def _enough(packs: list[Pack]) -> list[Pack]:
    """PACKS of them: one pack rounds so seldom that a single token decides which engine is farther from the truth (of a
    good one 2.2 and 3.0 times the reference's distance were seen). Another order rounds anew.
    """
    cut = [_cut(pack) for pack in packs]
    cut = [pack for pack in cut if pack.labels] or packs
    return [*packs, *(_shuffled(cut[i % len(cut)], i) for i in range(PACKS - len(packs)))]


def _shuffled(pack: Pack, seed: int) -> Pack:
    """Documents as long, trained in the same places, of the same tokens."""
    import numpy as np

    dealer = np.random.RandomState(seed)
    documents = [Document(d.id, dealer.permutation(d.ids), d.trained) for d in pack.documents]
    return Pack(documents, pack.tokens, pack.labels)


def _cut(pack: Pack) -> Pack:
    """Its first documents, two at least, up to TOKENS."""
    kept = [
        d for i, d in enumerate(pack.documents) if i < 2 or sum(len(e.ids) for e in pack.documents[: i + 1]) <= TOKENS
    ]
    return Pack(kept, sum(len(d.ids) for d in kept), sum(label_count(d.trained) for d in kept))


def judges(setting: Setting, truth: Truth, progress: Progress) -> Judges:
    """The reference, one model at a time; its gradients in fp32 are left in `truth`.

    Raises SparkError where memory does not suffice, as `judged` does.
    """
    import torch

    guard.limit_memory(setting.plan.machine)
    with exactly():
        judge = partial(load_judge, setting)
        exact = measure(setting, partial(judge, torch.float32), truth, "the truth in fp32", progress, making=True)
        theirs = measure(setting, partial(judge, torch.bfloat16), truth, "the reference in bf16", progress)
    return Judges(exact, theirs)


def judged(setting: Setting, truth: Truth, progress: Progress) -> Judged:
    """The plan's engine beside `truth`, which `judges` has made."""
    import_first(setting.plan.engine)
    guard.limit_memory(setting.plan.machine)
    with exactly():
        ours = measure(setting, partial(load_engine, setting), truth, f"the {setting.plan.engine} engine", progress)
        formula, skipped = in_fp32(setting, truth, progress)
    return Judged(ours, formula, skipped)


def certificate(plan: PlanTable, judges: Judges, judged: Judged) -> Certificate:
    """What the measurements of one setting come to."""
    truth, theirs, ours, formula = judges.truth, judges.theirs, judged.ours, judged.formula
    rows = [
        TensorRow(
            name, len(distance.tensors), ours.distances[name].relative, distance.relative,
            formula.distances[name].relative if formula else None,
        )
        for name, distance in theirs.distances.items()
    ]  # fmt: skip
    three = (truth, theirs, ours)
    return Certificate(
        engine=plan.engine,
        tensors=sorted(rows, key=lambda row: -row.ratio),
        document_loss=compared(*(one.losses for one in three), floor=LOSS_FLOOR),
        course_loss=compared(
            *([point.loss for point in one.course] for one in three), floor=COURSE_LOSS_FLOOR, limit=COURSE_RATIO
        ),
        course_norm=compared(
            *([point.norm for point in one.course] for one in three), floor=COURSE_NORM_FLOOR, limit=COURSE_RATIO
        ),
        steps=list(zip(*(one.course for one in three), strict=True)),
        formula_skipped=judged.skipped,
    )


@dataclass
class Measured:
    """Of one engine. distances: of its gradients from the truth's, none of its own."""

    distances: dict[str, Distance] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    course: list[Point] = field(default_factory=list)


@dataclass
class Judges:
    """The reference in fp32 and in bf16."""

    truth: Measured
    theirs: Measured


@dataclass
class Judged:
    """An engine as it trains, and its gradients in fp32. skipped: why there are none."""

    ours: Measured
    formula: Measured | None
    skipped: str | None


def measure(
    setting: Setting, load: Callable[[], Engine], truth: Truth, what: str, progress: Progress,
    gradients_alone: bool = False, making: bool = False,
) -> Measured:  # fmt: skip
    """Load an engine, compute what is asked of it, and let it go. making: it is the truth, and leaves its gradients."""
    found, plan = Measured(), setting.plan
    documents, course = ([], []) if gradients_alone else (setting.documents, setting.course)
    hint = f"free memory, or go without a certificate: `sparkctl train {setting.name} --no-certificate`"
    random.seed_all(plan.seed)
    with progress.task(what, len(setting.packs) + len(documents) + len(course)) as task, guard.memory(what, hint):
        engine = load()
        if setting.start:
            state.load_trainable(setting.start, engine.parameters())
        else:
            fill_adapters(engine.parameters(), plan.seed)
        for number, added in enumerate(_added(setting.packs)):
            _clear(engine)
            for pack in added:
                engine.micro_step(pack, 1 / pack.labels)
                task.advance()
            if making:
                truth.keep(number, engine)
            else:
                add_distances(found.distances, engine, truth.of(number), setting.name, whole=number == 0)
        _clear(engine)
        for pack in documents:
            found.losses.append(float(engine.eval_sum(pack)) / pack.labels)
            task.advance()
        for point in _train(engine, course, plan):
            found.course.append(point)
            task.advance()
        del engine
    _release()
    return found


def _added(packs: Sequence[Pack]) -> list[Sequence[Pack]]:
    """Packs whose gradients are compared as one: the first two are added up, as an optimiser step adds its packs."""
    return [packs[:2], *([pack] for pack in packs[2:])] if packs else []


def _train(engine: Engine, course: Sequence[Pack], plan: PlanTable) -> Iterator[Point]:
    """Optimiser steps of a pack each, at the plan's learning rate over a course as short as this."""
    if not course:
        return
    short = plan.model_copy(update={"warmup_steps": min(plan.warmup_steps, len(course) // 10)})
    optimizer = Optimizer(engine.parameters(), short)
    for step, pack in enumerate(course):
        loss = float(engine.micro_step(pack, 1 / pack.labels)) / pack.labels
        yield Point(loss, float(optimizer.clip()))
        optimizer.step(learning_rate(short, step, len(course)))


def load_judge(setting: Setting, dtype: torch.dtype) -> Engine:
    """The reference, a few documents at a time, activations recomputed where memory is a GPU's."""
    import torch

    from sparkctl.train.engines import reference

    longest = max(len(d.ids) for pack in (*setting.packs, *setting.course) for d in pack.documents)
    area = min(setting.plan.pack_length, max(longest, AREA))
    on_gpu = setting.plan.machine.device == "cuda"
    changes = {"pack_length": area, "checkpointing": setting.plan.checkpointing or on_gpu}
    plan = setting.plan.model_copy(update=changes)
    if on_gpu:  # some of torch's functions have no deterministic kernel: a judge may do without
        torch.use_deterministic_algorithms(True, warn_only=True)
    return reference.load(plan, setting.folder, {}, dtype, plain=True, name=setting.name)


def load_engine(setting: Setting) -> Engine:
    """The plan's engine, as a training would have it."""
    return make_engine(setting.plan, setting.folder, setting.choices, setting.name, setting.allow_slow)


def in_fp32(setting: Setting, truth: Truth, progress: Progress) -> tuple[Measured | None, str | None]:
    """(the engine's gradients in fp32, None) or (None, why there are none)."""
    import torch

    engine = setting.plan.engine
    if engine == "reference":
        return None, "the reference in fp32 is the truth"
    if engine not in IN_FP32:
        return None, f"the {engine} engine computes in its own precision alone"
    plan = setting.plan.model_copy(update={"checkpointing": True})
    load = import_module(ENGINES[engine]).load
    fp32 = partial(
        load, plan, setting.folder, setting.choices, torch.float32, allow_slow=setting.allow_slow, name=setting.name
    )
    try:
        return measure(setting, fp32, truth, f"the {engine} engine in fp32", progress, gradients_alone=True), None
    except _too_large() as error:  # a tile that fits in bf16 may not in fp32
        _release()
        return None, f"the {engine} engine could not compute in fp32 ({str(error).splitlines()[0]})"


def _too_large() -> tuple[type[Exception], ...]:
    """What is raised where memory, a device's or a multiprocessor's, is too small for fp32."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return (NoMemory,)
    return (NoMemory, OutOfResources)


def _clear(engine: Engine) -> None:
    for parameter in engine.parameters().values():
        parameter.grad = None


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def exactly() -> Iterator[None]:
    """fp32 means fp32 in this block: no TF32 in products or convolutions. Determinism is afterwards as before."""
    import torch

    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
