"""Carrying a training out, and recording what becomes of it: begun, saved, interrupted, failed, done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from sparkctl.errors import Interrupted, SparkError
from sparkctl.files import sweep_stages
from sparkctl.hardware.software import versions
from sparkctl.manifest.schema import BaseTable, Checkpoint, Manifest, TrainTable
from sparkctl.manifest.store import now
from sparkctl.progress import Progress, silent
from sparkctl.steps.bases import read_base, same_base
from sparkctl.steps.training import METRICS, Job
from sparkctl.train import state
from sparkctl.train.ranks import Ranks
from sparkctl.train.state import State

if TYPE_CHECKING:
    from sparkctl.train.session import Session

MEASURED_STEPS = 5  # at least so many steps make a rate

Status = Literal["running", "interrupted", "failed", "done"]


def carry_out(
    job: Job,
    checkpoint: Path | None,
    ranks: Ranks,
    progress: Progress,
    also: Callable[[Manifest], None] | None = None,
    gate_limit: float | None = None,
) -> TrainTable:
    """Train from `checkpoint` (None: from the beginning) to the end; [train] as it is then.

    Nothing in the run changes before the rehearsal has passed. `also` edits the manifest when training begins.
    gate_limit: what the result is to be held to; written down, so that a resume after a kill knows it.
    """
    from sparkctl.train.guard import Signals
    from sparkctl.train.metrics import Metrics, truncate

    progress = progress if ranks.writes else silent
    base = base_of(job, checkpoint, progress) if ranks.writes else None
    session = open_session(job, checkpoint, ranks, progress)
    signals = Signals(f"sparkctl resume {job.run.root}", progress.say)
    recorder = _Recorder(job, session, gate_limit, base)
    ranks.meet(session.engine.device)  # all have read the run before the first changes it
    with signals.caught():
        if not ranks.writes:
            session.loop(job.checkpoints, None, signals, recorder.saved, progress).run()
            return recorder.table("done")
        drop_later(job, session.state.step)
        state.prune(job.checkpoints, job.plan.keep, session.state.best_checkpoint)  # a kill may have come before it
        recorder.write("running", also)
        truncate(job.run.root / METRICS, session.state.step)
        with recorder.outcome(), closing(Metrics(job.run.root / METRICS)) as metrics:
            session.loop(job.checkpoints, metrics, signals, recorder.saved, progress).run()
    note_rate(job, ranks.size)
    return recorder.table("done")


def base_of(job: Job, checkpoint: Path | None, progress: Progress) -> BaseTable:
    """The weights to train on. Raises UsageError where a training that goes on began with others."""
    folder, trained = job.model_folder(progress), job.run.manifest.train
    same = same_base(job.run, trained, folder, job.model, progress) if checkpoint and trained else None
    return same or read_base(folder, job.model, None, progress)


def open_session(job: Job, checkpoint: Path | None, ranks: Ranks, progress: Progress) -> Session:
    """The training in memory, restored, rehearsed."""
    from sparkctl.train.session import Session

    folder = job.model_folder(progress)
    before = job.run.manifest.train if checkpoint else None
    session = Session.open(
        job.plan, folder, job.store(), choices=before.choices if before else None, ranks=ranks, name=str(job.run.root),
        allow_slow=job.allow_slow,
    )  # fmt: skip
    if checkpoint:
        session.restore(checkpoint)
    elif job.parent:
        session.start_from(job.parent[1])
    if before:
        _compare(before, session, progress)
    for part, what in session.engine.describe():
        progress.say(f"{part}: {what}")
    if ranks.writes:
        job.checkpoints.mkdir(exist_ok=True)
        sweep_stages(job.checkpoints)
    session.rehearse(job.checkpoints)
    return session


def note_rate(job: Job, processes: int) -> None:
    """Keep this machine's rate for the plans to come: of whole steps, without evaluations, saves and the warm-up."""
    from sparkctl.hardware.machine import this_machine
    from sparkctl.hardware.measurements import Kind, record
    from sparkctl.train.metrics import read

    steps = [line for line in read(job.run.root / METRICS) if "loss" in line]
    warm = steps[len(steps) // 5 :]
    if len(warm) >= MEASURED_STEPS:
        rate = sum(line["tokens"] for line in warm) / sum(line["seconds"] for line in warm)
        plan = job.plan
        kind = Kind(job.model.config_sha256, plan.mode, plan.lora.r if plan.lora else 0, plan.checkpointing, processes)
        record(this_machine(), kind, plan.engine, rate, plan.pack_length, now())


def drop_later(job: Job, step: int) -> None:
    """Remove checkpoints of steps after `step`, newest first: they belong to a course that is not taken."""
    for checkpoint in reversed(state.listed(job.checkpoints)):
        if state.step_of(checkpoint) > step:
            state.remove(checkpoint)


def _compare(before: TrainTable, session: Session, progress: Progress) -> None:
    """Say what differs from the start of this training: the weights go on, their last bits may not."""
    then = {**before.versions, **before.choices}
    here = {**versions(), **session.engine.choices()}
    changed = [f"{name} {then[name]}, now {here.get(name, 'absent')}" for name in then if then[name] != here.get(name)]
    if changed:
        progress.say(f"not bit for bit what an uninterrupted run gives; it began with {'; '.join(changed)}")


class _Recorder:
    """Keeps [train] and [[checkpoints]] true while a training runs."""

    def __init__(self, job: Job, session: Session, gate_limit: float | None, base: BaseTable | None) -> None:
        self._job, self._session, self._gate_limit, self._base = job, session, gate_limit, base
        self._state = session.state
        before = job.run.manifest.train
        self._started = before.started if before and self._state.step else now()
        self._last: str | None = state.checkpoint_id(self._state.step) if self._state.step else None

    def table(self, status: Status) -> TrainTable:
        """[train] at this moment."""
        at, session, plan = self._state, self._session, self._job.plan
        return TrainTable(
            status=status,
            started=self._started,
            engine=plan.engine,
            versions=versions(),
            choices=session.engine.choices(),
            made_from=self._job.made_from,
            step=state.step_of(Path(self._last)) if self._last else 0,
            steps=session.schedule.steps,
            trainable_parameters=sum(p.numel() for p in session.engine.parameters().values()),
            first_loss=at.first_loss,
            final_loss=fmean(at.recent_losses) if at.recent_losses else None,
            first_eval_loss=at.first_eval_loss,
            final_eval_loss=at.eval_loss,
            best_eval_loss=at.best_eval_loss,
            best_checkpoint=at.best_checkpoint,
            last_checkpoint=self._last,
            tokens=at.tokens,
            tokens_per_second=round(at.tokens / at.seconds, 1) if at.seconds else None,
            seconds=round(at.seconds, 3),
            estimated_seconds=plan.estimates.seconds,
            peak_memory=at.peak_memory,
            estimated_peak_memory=plan.estimates.peak_memory,
            gate_limit=self._gate_limit,
            base=self._base,
        )

    def write(self, status: Status, also: Callable[[Manifest], None] | None = None) -> None:
        """[train] with that status, and the checkpoints that are really there."""
        with self._job.run.edit() as manifest:
            manifest.train = self.table(status)
            manifest.checkpoints = [*self._others(manifest), *self._steps(manifest)]
            if also:
                also(manifest)

    def saved(self, checkpoint: Path, at: State, gone: list[str]) -> None:
        """The loop saved a checkpoint and removed others."""
        self._last = checkpoint.name
        self.write("running")

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Record how the block ended. Where not even that can be written, the step's lock tells of the death."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError, SparkError):
                self.write("interrupted" if isinstance(error, Interrupted) else "failed")
            raise
        self.write("done")

    def _others(self, manifest: Manifest) -> list[Checkpoint]:
        return [checkpoint for checkpoint in manifest.checkpoints if checkpoint.kind != "step"]

    def _steps(self, manifest: Manifest) -> list[Checkpoint]:
        known = {checkpoint.id: checkpoint for checkpoint in manifest.checkpoints if checkpoint.kind == "step"}
        entries = []
        for path in state.listed(self._job.checkpoints):
            digest = state.digest(path)
            before = known.get(path.name)
            entries.append(before if before and before.digest == digest else self._entry(path, digest))
        return entries

    def _entry(self, path: Path, digest: str) -> Checkpoint:
        job, at = self._job, state.read_state(path)
        parent = f"{job.parent[0].manifest.run.id}:{job.parent[1].name}" if job.parent else "base"
        return Checkpoint(
            id=path.name,
            kind="step",
            parent=parent,
            path=job.run.relative(path),
            step=at.step,
            created=now(),
            digest=digest,
            eval_loss=at.eval_loss,
        )
