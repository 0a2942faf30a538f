"""`train --gate`: the parent's result and the new one on the same held-out data."""

from __future__ import annotations

from pathlib import Path

from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.schema import Gate
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress
from sparkctl.steps.inputs import analysed
from sparkctl.steps.training import Job, model_folder, parent_of
from sparkctl.train import state

Rival = tuple[Run, Path]  # the parent and its best checkpoint


def rival(run: Run) -> Rival:
    """Whom the new result is measured against. Raises UsageError, before any training, where that cannot be done."""
    parent, checkpoint = parent_of(run)
    state.verify(checkpoint)
    ours, theirs = analysed(run), analysed(parent)
    if (ours[0].tokenizer_sha256, ours[0].vocab_size) != (theirs[0].tokenizer_sha256, theirs[0].vocab_size):
        raise UsageError(
            f"`{parent.root}` reads tokens of another tokenizer, so its loss cannot stand beside this one",
            f"sparkctl train {run.root}, without `--gate`",
        )
    if not ours[2].eval_examples:
        raise UsageError(
            f"`{run.root}` holds no example out to measure on", "sparkctl analyze … --eval-fraction 0.02 --force"
        )
    return parent, checkpoint


def judge(job: Job, rival: Rival, limit: float, progress: Progress) -> Gate:
    """Write [train.gate]. Raises SparkError where the new loss is worse by more than `limit` of the parent's."""
    parent, checkpoint = rival
    trained = job.run.manifest.train
    assert trained
    assert trained.best_eval_loss is not None
    theirs = _parent_loss(job, parent, checkpoint, progress)
    loss = trained.best_eval_loss
    gate = Gate(limit=limit, parent_loss=theirs, loss=loss, passed=loss <= theirs * (1 + limit))
    with job.run.edit() as manifest:
        assert manifest.train
        manifest.train.gate = gate
    if not gate.passed:
        raise SparkError(
            f"held-out loss {loss:.4f} is {loss / theirs - 1:.1%} worse than the parent's {theirs:.4f}; "
            f"the gate allows {limit:.1%}",
            f"keep `{parent.root}` in service, and look at the new data: `sparkctl show {job.run.root}`",
        )
    return gate


def _parent_loss(job: Job, parent: Run, checkpoint: Path, progress: Progress) -> float:
    """The parent's checkpoint over its own base, on this run's held-out examples."""
    from sparkctl.data.batches import eval_packs
    from sparkctl.train.engines import make_engine
    from sparkctl.train.loop import held_out_loss
    from sparkctl.train.ranks import Ranks

    trained = state.read_state(checkpoint)
    plan = job.plan.model_copy(update={"mode": trained.mode, "lora": trained.lora, "checkpointing": False})
    engine = make_engine(plan, model_folder(parent, analysed(parent)[0], progress), name=str(job.run.root))
    state.load_trainable(checkpoint, engine.parameters())
    progress.say(f"scoring `{parent.root}` ({checkpoint.name}) on this run's held-out examples")
    return held_out_loss(engine, eval_packs(job.store(), plan.pack_length), Ranks.current())
