"""`sparkctl verify lossless`: [lossless], the certificate of a run's engine; `train` asks for it before a long run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING

from sparkctl.errors import SparkError
from sparkctl.manifest.evidence import Lossless
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import PlanTable
from sparkctl.manifest.store import Run, now
from sparkctl.manifest.table import EngineName
from sparkctl.progress import Progress, silent
from sparkctl.steps.certifying import certificate_of
from sparkctl.steps.inputs import recommend_command
from sparkctl.steps.record import versions
from sparkctl.steps.training import Job, claimed, planned
from sparkctl.train.ranks import Ranks
from sparkctl.words import quoted

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.verify.certificate import Certificate

STEPS, FEWEST = 30, 5  # optimiser steps side by side
SHARE = 0.1  # of the training's tokens, that a certificate made by `train` may compute
LONG = 3600.0  # seconds of a training that is worth a certificate
ENDLESS = 1e9  # stands for a ratio without bounds: an engine that gave no number


@dataclass(frozen=True)
class Result:
    """A certificate: in full, and as the manifest keeps it. rank: whose word it is."""

    run: Path
    table: Lossless
    certificate: Certificate
    rank: int = 0

    @property
    def hint(self) -> str:
        """How to train where the engine did not pass."""
        return _mend(Run.open(self.run))


def verify_lossless(
    folder: Path, *, engine: EngineName | None = None, steps: int = STEPS, allow_slow: bool = False,
    progress: Progress = silent,
) -> Result:  # fmt: skip
    """Make the certificate of the run's engine, or of another, and write it down."""
    run = Run.open(folder)
    with claimed(run, "verify") as ranks:
        job = planned(run, allow_slow)
        if engine:
            job = replace(job, plan=job.plan.model_copy(update={"engine": engine}))
        run.require_writable()
        table, found = certified(job, steps, _choices(job), progress if ranks.writes else silent)
        _keep(run, table, ranks)
        return Result(run.root, table, found, ranks.rank)


def require(job: Job, ranks: Ranks, progress: Progress) -> None:
    """Raise SparkError where a long training would run on an engine that is not lossless here.

    A certificate that is there and still true is not made again. Every rank makes its own: none waits for another.
    """
    if job.plan.engine == "reference" or job.plan.estimates.seconds <= LONG:
        return
    table, progress = job.run.manifest.lossless, progress if ranks.writes else silent
    if table is None or table.made_from != _made_from(job, job.model_folder(progress), {}):
        progress.say("a training of more than an hour: first the certificate that its engine is lossless here")
        table = certificate_of(job, affordable(job.plan), progress)
        _keep(job.run, table, ranks)
    if not table.passed:
        raise SparkError(
            f"the {table.engine} engine is not lossless with this model on this machine: {'; '.join(table.problems)}",
            _mend(job.run),
        )


def affordable(plan: PlanTable) -> int:
    """Steps of a course that is cheap beside the training: all of them, but for an hour on a slow CPU."""
    from sparkctl.verify.lossless import PACKS, TOKENS

    tokens = SHARE * plan.estimates.seconds * plan.estimates.tokens_per_second / 4  # two judges, and the engine twice
    return max(FEWEST, min(STEPS, int(tokens / min(TOKENS, plan.pack_length)) - PACKS))


def _mend(run: Run) -> str:
    other = recommend_command(run, "--engine", "reference")
    return f"`{other}`, or `sparkctl train {quoted(run.root)} --no-certificate`"


def certified(job: Job, steps: int, choices: dict[str, str], progress: Progress) -> tuple[Lossless, Certificate]:
    """The certificate of the job's engine, made in this process: as the manifest keeps it, and in full.

    choices: what the engine is pinned to; none where the training begins anew.
    """
    from sparkctl.data.batches import Schedule
    from sparkctl.train.watch import watched_alone
    from sparkctl.verify.lossless import Setting, certify, chosen_packs

    plan, began, folder = job.plan, time.monotonic(), job.model_folder(progress)
    schedule = Schedule(
        job.store(), pack_length=plan.pack_length, gradient_accumulation=plan.gradient_accumulation,
        epochs=plan.epochs, seed=plan.seed, max_steps=plan.max_steps,
    )  # fmt: skip
    packs, course = chosen_packs(schedule, steps)
    start = job.parent[1] if job.parent else None
    setting = Setting(plan, folder, packs, course, start, quoted(job.run.root), job.allow_slow, choices)
    made_from = _made_from(job, folder, choices)
    with watched_alone(plan.machine, "the certificate was made"):
        found = certify(setting, progress)
    return _table(job, packs, found, made_from, time.monotonic() - began), found


def _choices(job: Job) -> dict[str, str]:
    """What the training that this run has begun is pinned to, none where there is nothing that could be resumed."""
    before = job.before
    begun = before and before.last_checkpoint and (before.made_from, before.engine) == (job.made_from, job.plan.engine)
    return before.choices if before and begun else {}


def _keep(run: Run, table: Lossless, ranks: Ranks) -> None:
    if ranks.writes:
        with run.edit() as manifest:
            manifest.lossless = table


def _table(job: Job, packs: list[Pack], found: Certificate, made_from: str, seconds: float) -> Lossless:
    documents = [document for pack in packs for document in pack.documents]
    plan, formula = job.plan, found.worst_formula
    return Lossless(
        passed=not found.problems,
        problems=found.problems,
        engine=plan.engine,
        mode=plan.mode,
        device=_device(plan),
        dtype="bfloat16",
        packs=f"{len(packs)} packs of {len(documents)} documents, {sum(pack.tokens for pack in packs):,} tokens, the "
        f"longest document {max(len(document.ids) for document in documents):,}",
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
        made_from=made_from,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else ENDLESS


def _made_from(job: Job, folder: Path, choices: dict[str, str]) -> str:
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
