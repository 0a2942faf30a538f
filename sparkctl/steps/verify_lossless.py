"""`sparkctl verify lossless`: [lossless], the certificate of a run's engine; `train` asks for it before a long run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.errors import SparkError
from sparkctl.manifest.evidence import Lossless
from sparkctl.manifest.schema import PlanTable
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import EngineName
from sparkctl.progress import Progress, silent
from sparkctl.steps.certificate import certified, made_from
from sparkctl.steps.inputs import recommend_command
from sparkctl.steps.training import Job, claimed, planned
from sparkctl.train.ranks import Ranks
from sparkctl.words import quoted

if TYPE_CHECKING:
    from sparkctl.verify.certificate import Certificate

STEPS, FEWEST = 30, 5  # optimiser steps side by side
SHARE = 0.1  # of the training's tokens, that a certificate made by `train` may compute
LONG = 3600.0  # seconds of a training that is worth a certificate


@dataclass(frozen=True)
class Result:
    """A certificate: in full, and as the manifest keeps it."""

    run: Path
    table: Lossless
    certificate: Certificate

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
        table, found = certified(job, steps, _choices(job), progress)
        _keep(run, table, ranks)
        return Result(run.root, table, found)


def require(job: Job, ranks: Ranks, progress: Progress) -> None:
    """Raise SparkError where a long training would run on an engine that is not lossless here.

    A certificate that is there and still true is not made again. Every rank makes its own, and hears of it with all.
    """
    if job.plan.engine == "reference" or job.plan.estimates.seconds <= LONG:
        return
    table = job.run.manifest.lossless
    if table is None or table.made_from != made_from(job, job.model_folder(progress), {}):
        progress.say("a training of more than an hour: first the certificate that its engine is lossless here")
        table, _ = certified(job, affordable(job.plan), {}, progress)
        _keep(job.run, table, ranks)
    failed = ranks.sum([float(not table.passed)])[0]  # and the first has written its own down
    if failed:
        problems = "; ".join(table.problems) or "on another rank"
        raise SparkError(
            f"the {table.engine} engine is not lossless with this model on this machine: {problems}",
            _mend(job.run),
        )


def affordable(plan: PlanTable) -> int:
    """Steps of a course that is cheap beside the training: all of them, but for an hour on a slow CPU."""
    from sparkctl.verify.lossless import PACKS, TOKENS

    tokens = SHARE * plan.estimates.seconds * plan.estimates.tokens_per_second / 4  # two judges, and the engine twice
    return max(FEWEST, min(STEPS, int(tokens / min(TOKENS, plan.pack_length)) - PACKS))


def _mend(run: Run) -> str:
    other = recommend_command(run, engine="reference")
    return f"`{other}`, or `sparkctl train {quoted(run.root)} --no-certificate`"


def _choices(job: Job) -> dict[str, str]:
    """What the training that this run has begun is pinned to, none where there is nothing that could be resumed."""
    before = job.before
    begun = before and before.last_checkpoint and (before.made_from, before.engine) == (job.made_from, job.plan.engine)
    return before.choices if before and begun else {}


def _keep(run: Run, table: Lossless, ranks: Ranks) -> None:
    if ranks.writes:
        with run.edit() as manifest:
            manifest.lossless = table
