"""`sparkctl resume`: a training that stopped goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Manifest, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress, silent
from sparkctl.steps import gate as gates
from sparkctl.steps.record import carry_out, newest_whole, resumed
from sparkctl.steps.training import Job, claimed, complete, planned
from sparkctl.train import state
from sparkctl.words import quoted


@dataclass(frozen=True)
class Result:
    """`checkpoint` is where it went on from; None: from the beginning, since nothing whole had been saved."""

    run: Path
    train: TrainTable
    checkpoint: str | None
    up_to_date: bool = False
    made: str | None = None  # when its last checkpoint was written, where it is up to date


def resume(
    folder: Path, *, checkpoint: str | None = None, allow_slow: bool = False, dry_run: bool = False,
    progress: Progress = silent,
) -> Result:  # fmt: skip
    """Go on from the newest complete checkpoint, or from the one named.

    A gate that `train` was given is kept to: SparkError where its limit is passed, after all is saved.
    """
    run = Run.open(folder)
    with claimed(run, "resume") as ranks:
        job, trained = planned(run, allow_slow), run.manifest.train
        if trained is None:
            raise UsageError(f"`{run.root}` has not been trained yet", f"sparkctl train {quoted(run.root)}")
        if trained.made_from != job.made_from:
            raise UsageError(
                f"the plan or the data of `{run.root}` changed since this training began",
                f"sparkctl train {quoted(run.root)} --force",
            )
        limit = trained.gate_limit
        rival = gates.rival(run) if limit is not None else None
        if checkpoint is None and trained.status == "done" and complete(job):
            if rival is not None and limit is not None and trained.gate is None and not dry_run:  # killed before it
                gates.settle(job, rival, trained, limit, ranks, progress)
            made = run.made(trained.last_checkpoint)
            return Result(run.root, trained, trained.last_checkpoint, True, made)
        start = _named(job, checkpoint) if checkpoint else newest_whole(job, progress)
        id = start.name if start else None
        if dry_run:
            return Result(run.root, trained, id)
        run.require_writable()
        progress.say(f"resuming from {id}" if id else "nothing whole was saved: resuming from the beginning")
        entry = resumed(start, f"--from {checkpoint}" if checkpoint else trained.ended_by)

        def record(manifest: Manifest) -> None:
            manifest.resumes = [*manifest.resumes, entry]

        trained = carry_out(job, start, ranks, progress, record, limit)
        if rival is not None and limit is not None:
            gates.settle(job, rival, trained, limit, ranks, progress)
        return Result(run.root, trained, id)


def _named(job: Job, id: str) -> Path:
    """The checkpoint of that id. Raises UsageError where there is none, CheckpointDamaged where it is not whole."""
    there = {path.name: path for path in state.listed(job.checkpoints)}
    if id not in there:
        known = ", ".join(there) or "none"
        raise UsageError(
            f"no checkpoint `{id}` in `{job.run.root}`; there: {known}", f"sparkctl show {quoted(job.run.root)}"
        )
    state.verify(there[id])
    return there[id]
