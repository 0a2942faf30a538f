"""`sparkctl train`: the plan, carried out as it stands; [train], [[checkpoints]], checkpoints/ and metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Manifest, PlanTable, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress, silent
from sparkctl.steps import gate as gates
from sparkctl.steps import verify_lossless
from sparkctl.steps.record import carry_out
from sparkctl.steps.training import Job, claimed, complete, planned
from sparkctl.train import state
from sparkctl.words import quoted


@dataclass(frozen=True)
class Result:
    """What a training came to. train: None under --dry-run, where nothing was trained yet. made: when its last
    checkpoint was written.
    """

    run: Path
    plan: PlanTable
    train: TrainTable | None
    up_to_date: bool = False
    made: str | None = None


def train(
    folder: Path, *, gate: float | None = None, allow_slow: bool = False, certificate: bool = True,
    force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Result:  # fmt: skip
    """Train the run in `folder`. certificate: a long training begins with the proof that its engine is lossless here.

    Raises SparkError where that fails, and where the gate's limit is passed, after all is saved.
    """
    run = Run.open(folder)
    with claimed(run, "train") as ranks:
        job = planned(run, allow_slow)
        rival = gates.rival(run) if gate is not None else None
        done = not force and _done(job)
        trained = run.manifest.train
        made = run.made(trained.last_checkpoint) if trained else None
        if dry_run:
            return Result(run.root, job.plan, trained, done, made)
        if not done or trained is None:
            run.require_writable()
            if certificate:
                verify_lossless.require(job, ranks, progress)
            trained = carry_out(job, None, ranks, progress, _begin_anew, gate)
        if rival is not None and gate is not None:
            gates.settle(job, rival, trained, gate, ranks, progress)
        return Result(run.root, job.plan, trained, done, made)


def _begin_anew(manifest: Manifest) -> None:
    manifest.resumes = []


def _done(job: Job) -> bool:
    """Whether this training is there already. Raises UsageError where another one is, or one that stopped half-way."""
    run, trained = job.run, job.run.manifest.train
    if trained is None:
        return False
    anew = f"sparkctl train {quoted(run.root)} --force"
    if trained.made_from != job.made_from:
        if trained.step == 0 and not state.listed(job.checkpoints):
            return False  # it failed before anything was worth keeping, and was planned anew
        raise UsageError(
            f"`{run.root}` was trained with another plan or other data",
            f"`{anew}` begins anew; or analyze into a new run",
        )
    if trained.status == "done" and complete(job):
        return True
    what = f"the training of `{run.root}` stopped at step {trained.step} of {trained.steps}"
    if trained.status == "done":
        what = f"a checkpoint of `{run.root}` is damaged or gone"
    raise UsageError(what, f"sparkctl resume {quoted(run.root)}")
