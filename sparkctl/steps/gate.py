"""`train --gate`: the parent's result and the new one on the same held-out data."""

from __future__ import annotations

from pathlib import Path

from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.schema import Gate, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress
from sparkctl.steps.inputs import analysed, hold_out_command
from sparkctl.steps.training import Job, model_folder, parent_of
from sparkctl.train import state
from sparkctl.train.ranks import Ranks
from sparkctl.words import quoted

Rival = tuple[Run, Path]  # the parent and its best checkpoint


def rival(run: Run) -> Rival:
    """Whom the new result is measured against. Raises UsageError, before any training, where that cannot be done."""
    parent, checkpoint = parent_of(run)
    state.verify(checkpoint)
    ours, theirs = analysed(run), analysed(parent)
    if (ours[0].tokenizer_sha256, ours[0].vocab_size) != (theirs[0].tokenizer_sha256, theirs[0].vocab_size):
        raise UsageError(
            f"`{parent.root}` reads tokens of another tokenizer, so its loss cannot stand beside this one",
            f"`sparkctl train {quoted(run.root)}`, without `--gate`",
        )
    if not ours[2].eval_examples:
        raise UsageError(
            f"`{run.root}` holds no example out to measure on",
            hold_out_command(run),
        )
    return parent, checkpoint


def score(job: Job, rival: Rival, trained: TrainTable, limit: float, ranks: Ranks, progress: Progress) -> Gate:
    """Both losses on this run's held-out examples; that of `trained` is known from its training."""
    theirs, loss = _parent_loss(job, *rival, ranks, progress), trained.best_eval_loss
    assert loss is not None
    return Gate(limit=limit, parent_loss=theirs, loss=loss, passed=loss <= theirs * (1 + limit))


def settle(job: Job, rival: Rival, trained: TrainTable, limit: float, ranks: Ranks, progress: Progress) -> None:
    """Score; the first rank writes it down and judges. Raises SparkError there where the limit is exceeded."""
    job.run.require_writable()
    gate = trained.gate = score(job, rival, trained, limit, ranks, progress)
    if ranks.writes:
        with job.run.edit() as manifest:
            assert manifest.train
            manifest.train.gate, manifest.train.gate_limit = gate, limit
        judge(job.run, rival, gate)


def judge(run: Run, rival: Rival, gate: Gate) -> None:
    """Raise SparkError where the new loss is worse by more than the gate's share of the parent's."""
    if not gate.passed:
        raise SparkError(
            f"held-out loss {gate.loss:.4f} is {gate.loss / gate.parent_loss - 1:.1%} worse than the parent's "
            f"{gate.parent_loss:.4f}; the gate allows {gate.limit:.1%}",
            f"keep `{rival[0].root}` in service, and look at the new data: `sparkctl show {quoted(run.root)}`",
        )


def _parent_loss(job: Job, parent: Run, checkpoint: Path, ranks: Ranks, progress: Progress) -> float:
    """The parent's checkpoint over its own base, on this run's held-out examples."""
    from sparkctl.data.batches import eval_packs
    from sparkctl.train.engines import make_engine
    from sparkctl.train.guard import Numbers
    from sparkctl.train.loop import held_out_loss
    from sparkctl.train.watch import watched_alone

    trained = state.read_state(checkpoint)
    plan = job.plan.model_copy(update={"mode": trained.mode, "lora": trained.lora, "checkpointing": False})
    folder = model_folder(parent, analysed(parent)[0], progress)
    store = job.store()
    numbers = Numbers(store.place, "look at these examples, or train without `--gate`")
    what = f"the held-out loss of `{parent.root}`"
    with watched_alone(plan.machine, f"`{parent.root}` was scored"):
        engine = make_engine(plan, folder, name=quoted(job.run.root), allow_slow=job.allow_slow)
        state.load_trainable(checkpoint, engine.parameters())
        progress.say(f"scoring `{parent.root}` ({checkpoint.name}) on this run's held-out examples")
        return held_out_loss(engine, eval_packs(store, plan.pack_length), ranks, numbers, what)
