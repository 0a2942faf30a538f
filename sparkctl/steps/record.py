"""Carrying a training out, and recording what becomes of it: begun, saved, interrupted, failed, done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal, Protocol

from sparkctl.errors import Interrupted, SparkError, refused_by_system, system_error
from sparkctl.files import sweep_stages
from sparkctl.hardware.measurements import Kind
from sparkctl.hardware.software import versions
from sparkctl.manifest.schema import BaseTable, Checkpoint, Course, Manifest, Resume, TrainTable
from sparkctl.manifest.store import Run, now
from sparkctl.manifest.table import CheckpointKind, EngineName
from sparkctl.progress import Progress
from sparkctl.train import state
from sparkctl.train.guard import AtOnce
from sparkctl.train.ranks import Ranks
from sparkctl.train.state import CheckpointDamaged, State
from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.train.session import Session

Status = Literal["running", "interrupted", "failed", "done"]


class Training(Protocol):
    """A training of a run: its model's (steps/training.py) or its MTP head's (steps/mtp_training.py).

    kind and prefix: of its checkpoints in [[checkpoints]], whose ids are their folders' names behind the prefix.
    """

    @property
    def kind(self) -> CheckpointKind: ...
    @property
    def prefix(self) -> str: ...
    @property
    def run(self) -> Run: ...
    @property
    def plan(self) -> Course: ...
    @property
    def made_from(self) -> str: ...
    @property
    def checkpoints(self) -> Path: ...
    @property
    def metrics(self) -> Path: ...
    @property
    def before(self) -> TrainTable | None: ...
    @property
    def again(self) -> str: ...
    @property
    def parent_id(self) -> str: ...
    def estimates(self) -> tuple[EngineName, float, int]: ...
    def alike(self, processes: int) -> Kind: ...
    def note(self, manifest: Manifest, table: TrainTable) -> None: ...
    def base(self, checkpoint: Path | None, progress: Progress) -> BaseTable | None: ...
    def open(self, choices: dict[str, str] | None, ranks: Ranks, progress: Progress) -> Session: ...


def carry_out(
    job: Training,
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
    from sparkctl.train.engines import import_first
    from sparkctl.train.guard import Signals
    from sparkctl.train.metrics import Metrics, truncate
    from sparkctl.train.watch import watched, watched_alone

    import_first(job.estimates()[0])
    base = job.base(checkpoint, progress) if ranks.writes else None
    with watched_alone(job.plan.machine, "the model was loaded"):
        session = open_session(job, checkpoint, ranks, progress)
    began = session.state.step
    signals = Signals(ranks.command(job.again), progress.say, relayed=ranks.size > 1)
    recorder = _Recorder(job, session, gate_limit, base)
    ranks.meet()  # all have read the run before the first changes it
    with signals.caught(), watched(job.plan.machine, signals), ranks.interrupted_together():
        if not ranks.writes:
            session.loop(job.checkpoints, None, signals, recorder.saved, progress).run()
            return recorder.table("done")
        drop_later(job, session.state.step)
        state.prune(job.checkpoints, job.plan.keep, session.state.best_checkpoint)  # a kill may have come before it
        recorder.write("running", also)
        truncate(job.metrics, session.state.step)
        with recorder.outcome(), closing(Metrics(job.metrics)) as metrics:
            session.loop(job.checkpoints, metrics, signals, recorder.saved, progress).run()
    note_rate(job, ranks.size, began)
    return recorder.table("done")


def open_session(job: Training, checkpoint: Path | None, ranks: Ranks, progress: Progress) -> Session:
    """The training in memory, restored, rehearsed."""
    before = job.before if checkpoint else None
    session = job.open(before.choices if before else None, ranks, progress)
    if checkpoint:
        session.restore(checkpoint, progress)
    if before:
        _compare(before, session, progress)
    for part, what in session.engine.describe():
        progress.say(f"{part}: {what}")
    _say_idle(job.plan, ranks.size, progress)
    if ranks.writes:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        sweep_stages(job.checkpoints)
    session.rehearse(job.checkpoints)
    session.engine.pin(ranks.of_the_first(session.engine.choices()))  # of what each rank's tuner found in it
    return session


def _say_idle(plan: Course, processes: int, progress: Progress) -> None:
    """Say where the packs of a step do not go round: some of the processes then wait for the others."""
    packs = plan.gradient_accumulation
    places = -(-packs // processes) * processes
    if places > packs:
        progress.say(
            f"a step has {counted(packs, 'pack')} for {processes} processes, of which some wait for the others; "
            f"packs of {packs * plan.pack_length // places:,} tokens (`--pack-length`) would go round"
        )


def newest_whole(job: Training, progress: Progress) -> Path | None:
    """The checkpoint to go on from, and a word about each that is damaged; None: there is nothing whole."""
    found, damaged = state.newest_complete(job.checkpoints)
    for problem in damaged:
        progress.say(f"{problem}; taking the one before it")
    return found


def resumed(checkpoint: Path | None, reason: str) -> Resume:
    """The entry of a training that goes on from `checkpoint`, now."""
    step, id = (state.step_of(checkpoint), checkpoint.name) if checkpoint else (0, None)
    return Resume(step=step, checkpoint=id, reason=reason, when=now())


def note_rate(job: Training, processes: int, began: int) -> None:
    """Keep this machine's rate for the plans to come: of this start's steps, those after `began`, without evaluations,
    saves and the warm-up."""
    from sparkctl.hardware.machine import this_machine
    from sparkctl.hardware.measurements import ENOUGH, record
    from sparkctl.train.metrics import read

    steps = [line for line in read(job.metrics) if "loss" in line and line["step"] > began]
    warm = steps[len(steps) // 5 :]
    if len(warm) >= ENOUGH:
        rate = sum(line["tokens"] for line in warm) / sum(line["seconds"] for line in warm)
        with suppress(SparkError):  # a driver that was updated meanwhile: the training is done all the same
            record(this_machine(), job.alike(processes), job.estimates()[0], rate, job.plan.pack_length, now())


def drop_later(job: Training, step: int) -> None:
    """Remove checkpoints of steps after `step`, newest first: they belong to a course that is not taken."""
    for checkpoint in reversed(state.listed(job.checkpoints)):
        if state.step_of(checkpoint) > step:
            state.remove(checkpoint)


def _compare(before: TrainTable, session: Session, progress: Progress) -> None:
    """Say what differs from the start of this training: the weights go on, their last bits may not."""
    then = {**before.versions, **before.choices, "processes": f"{before.processes}"}
    here = {**versions(), **session.engine.choices(), "processes": f"{session.ranks.size}"}
    changed = [f"{name} {then[name]}, now {here.get(name, 'absent')}" for name in then if then[name] != here.get(name)]
    if changed:
        progress.say(f"not bit for bit what an uninterrupted run gives; it began with {'; '.join(changed)}")


class _Recorder:
    """Keeps [train] and [[checkpoints]] true while a training runs."""

    def __init__(self, job: Training, session: Session, gate_limit: float | None, base: BaseTable | None) -> None:
        self._job, self._session, self._gate_limit, self._base = job, session, gate_limit, base
        self._state = session.state
        before = job.before
        self._started = before.started if before and self._state.step else now()
        self._last: str | None = state.checkpoint_id(self._state.step) if self._state.step else None
        self._stopped: str | None = None

    def table(self, status: Status) -> TrainTable:
        """[train] at this moment."""
        at, session = self._state, self._session
        engine, seconds, memory = self._job.estimates()
        return TrainTable(
            status=status,
            stopped=self._stopped,
            started=self._started,
            engine=engine,
            versions=versions(),
            choices=session.engine.choices(),
            processes=session.ranks.size,
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
            estimated_seconds=seconds,
            peak_memory=at.peak_memory,
            estimated_peak_memory=memory,
            gate_limit=self._gate_limit,
            base=self._base,
        )

    def write(self, status: Status, also: Callable[[Manifest], None] | None = None) -> None:
        """[train] with that status, and the checkpoints that are really there."""
        with self._job.run.edit() as manifest:
            self._job.note(manifest, self.table(status))
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
            stop = error.error if isinstance(error, AtOnce) else error
            self._stopped = stop.reason if isinstance(stop, Interrupted) else None
            with suppress(OSError, SparkError):
                self.write("interrupted" if isinstance(stop, Interrupted) else "failed")
            if self._last and isinstance(stop, OSError) and refused_by_system(stop):
                again = self._session.ranks.command(self._job.again)
                raise system_error(stop, f"`{again}` goes on from {self._last}") from error
            raise
        self.write("done")

    def _others(self, manifest: Manifest) -> list[Checkpoint]:
        return [checkpoint for checkpoint in manifest.checkpoints if checkpoint.kind != self._job.kind]

    def _steps(self, manifest: Manifest) -> list[Checkpoint]:
        known = {entry.id: entry for entry in manifest.checkpoints if entry.kind == self._job.kind}
        entries = []
        for path in state.listed(self._job.checkpoints):
            with suppress(FileNotFoundError, CheckpointDamaged):  # it is left alone, and is no checkpoint
                digest = state.digest(path)
                before = known.get(self._job.prefix + path.name)
                entries.append(before if before and before.digest == digest else self._entry(path, digest))
        return entries

    def _entry(self, path: Path, digest: str) -> Checkpoint:
        job, at = self._job, state.read_state(path)
        return Checkpoint(
            id=job.prefix + path.name,
            kind=job.kind,
            parent=job.parent_id,
            path=job.run.relative(path),
            step=at.step,
            created=now(),
            digest=digest,
            eval_loss=at.eval_loss,
        )
