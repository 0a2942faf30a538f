"""[lossless]: the certificate of a run's engine, and what it depends on."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING

from sparkctl.manifest.evidence import Lossless
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import PlanTable
from sparkctl.manifest.store import now
from sparkctl.model.promise import promising
from sparkctl.progress import Progress
from sparkctl.steps.bases import require_whole
from sparkctl.steps.certificate_process import certify
from sparkctl.steps.record import versions
from sparkctl.steps.training import Job
from sparkctl.words import counted, quoted

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.verify.certificate import Certificate

ENDLESS = 1e9  # stands for a ratio without bounds: an engine that gave no number


def certified(job: Job, steps: int, choices: dict[str, str], progress: Progress) -> tuple[Lossless, Certificate]:
    """The certificate of the job's engine: as the manifest keeps it, and in full. This process computes none of it.

    choices: what the engine is pinned to; none where the training begins anew.
    Raises SparkError where it cannot be made, or the training that it is for would be refused for its base; OSError
    where the system refuses something.
    """
    from sparkctl.data.batches import Schedule
    from sparkctl.train.watch import watched_alone
    from sparkctl.verify.lossless import Setting, chosen_packs

    plan, began, folder = job.plan, time.monotonic(), job.model_folder(progress)
    with promising(folder) as promised:  # in a process of its own, as all that a certificate computes
        require_whole(folder, promised)
    schedule = Schedule(
        job.store(), pack_length=plan.pack_length, gradient_accumulation=plan.gradient_accumulation,
        epochs=plan.epochs, seed=plan.seed, max_steps=plan.max_steps,
    )  # fmt: skip
    packs, course = chosen_packs(schedule, steps)
    start = job.parent[1] if job.parent else None
    setting = Setting(plan, folder, packs, course, start, quoted(job.run.root), job.allow_slow, choices)
    depends_on = made_from(job, folder, choices)
    with watched_alone(plan.machine, "the certificate was made"):
        found = certify(setting, job.run.root, progress)
    return _table(job, packs, found, depends_on, time.monotonic() - began), found


def made_from(job: Job, folder: Path, choices: dict[str, str]) -> str:
    """What a certificate depends on: the training, the engine, the device, the libraries that compute, the ways in
    which matrix products are computed. folder: the base model's."""
    ways = _ways(job.plan, folder, choices)
    return fingerprint(job.made_from, job.plan.engine, _device(job.plan), versions(), ways)


def _ways(plan: PlanTable, folder: Path, choices: dict[str, str]) -> dict[str, str]:
    """The products that are not torch's: on a GPU, in the native engine."""
    from sparkctl.hardware.measurements import Layers
    from sparkctl.model.inspect import read_config, text_part
    from sparkctl.train.engines.native.engine import ways_of

    if plan.engine != "native" or plan.machine.device == "cpu":
        return {}
    config = SimpleNamespace(**text_part(read_config(folder)))
    return ways_of(choices, Layers.of(config, plan.lora.r if plan.lora else 0))


def _device(plan: PlanTable) -> str:
    """The device that computes, by its name."""
    import torch

    on_gpu = plan.machine.device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else plan.machine.name


def _table(job: Job, packs: list[Pack], found: Certificate, depends_on: str, seconds: float) -> Lossless:
    plan, formula = job.plan, found.worst_formula
    return Lossless(
        passed=not found.problems,
        problems=found.problems,
        engine=plan.engine,
        mode=plan.mode,
        device=_device(plan),
        dtype="bfloat16",
        packs=_described(packs),
        tensors=len(found.tensors),
        worst_gradient_ratio=_finite(found.worst.ratio),
        worst_tensor=found.worst.name,
        median_gradient_ratio=_finite(median(row.ratio for row in found.tensors)),
        worst_fp32_distance=_finite(formula.formula or 0.0) if formula else None,
        worst_fp32_tensor=formula.name if formula else None,
        fp32_skipped=found.formula_skipped,
        document_loss_ratio=_finite(found.document_loss.ratio),
        steps=len(found.steps),
        course_loss=_finite(found.course_loss.ours),
        course_loss_reference=found.course_loss.theirs,
        course_norm=_finite(found.course_norm.ours),
        course_norm_reference=found.course_norm.theirs,
        versions=versions(),
        seconds=round(seconds, 1),
        created=now(),
        made_from=depends_on,
    )


def _described(packs: list[Pack]) -> str:
    """How many, and of what; those of documents that stand in one before have their tokens in another order."""
    lengths = {document.id: len(document.ids) for pack in packs for document in pack.documents}
    seen: set[int] = set()
    again = 0
    for pack in packs:
        ids = {document.id for document in pack.documents}
        again += not ids.isdisjoint(seen)
        seen |= ids
    return (
        f"{counted(len(packs), 'pack')} of {counted(len(lengths), 'document')}, "
        f"{sum(pack.tokens for pack in packs):,} tokens, the longest document {max(lengths.values()):,}"
        + (f"; {again} with the tokens in another order" if again else "")
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else ENDLESS
