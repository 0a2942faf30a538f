"""`sparkctl mtp train`: the MTP head trained for the merged model, measured, and kept where it helps; [mtp], mtp/.

There is no other command to go on with it: the same one does, from the newest checkpoint that is whole.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparkctl.errors import Interrupted, Terminated, UsageError
from sparkctl.files import sha256_file, staged_file
from sparkctl.manifest.evidence import Acceptance
from sparkctl.manifest.schema import HeadPlan, Manifest, MtpTable, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.plan.heads import HeadWishes, plan_head
from sparkctl.progress import Progress, silent
from sparkctl.steps import mtp_eval
from sparkctl.steps.inputs import TOKENS, analysed, analyze_command
from sparkctl.steps.merged import merged_entry, merged_model
from sparkctl.steps.mtp_training import HEAD, HeadJob, Request, head_fingerprint, note_skip, plan_settings
from sparkctl.steps.record import carry_out, newest_whole, resumed
from sparkctl.steps.training import claimed, model_folder
from sparkctl.train import state
from sparkctl.words import quoted

if TYPE_CHECKING:
    from sparkctl.model.weights import TensorFile
    from sparkctl.mtp.source import HeadSource
    from sparkctl.train.ranks import Ranks

ALIKE = "as many drafts are accepted of both heads, and the held-out loss fell from {:.4g} to {:.4g}"


@dataclass(frozen=True)
class Result:
    """What became of the head. mtp: None under --dry-run where nothing was trained yet. skipped: why there is none.
    made: when its last checkpoint was written, where it is up to date.
    """

    plan: HeadPlan | None = None
    mtp: MtpTable | None = None
    notes: tuple[str, ...] = ()
    skipped: str | None = None
    up_to_date: bool = False
    made: str | None = None


def mtp_train(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Train the head of the run's merged model, from where an earlier call stopped. Raises SparkError where it cannot.

    A base that has no head is no error: [mtp] says so.
    """
    from sparkctl.mtp.source import NoHead

    run = Run.open(request.run)
    with claimed(run, "mtp train") as ranks:
        request = request if force else _as_before(run, request)
        try:
            job = _planned(run, request, progress)
        except NoHead as missing:
            if ranks.writes and not dry_run:
                note_skip(run, missing.message)
            return Result(skipped=missing.message)
        done = not force and _done(job, request)
        if done or dry_run:
            made = run.made(f"{job.prefix}{job.before.last_checkpoint}") if job.before else None
            return Result(job.plan, run.manifest.mtp, up_to_date=done, made=made)
        run.require_writable()
        _train(job, ranks, force, progress)
        with _trained(request):
            notes = _settle(job, request, progress) if ranks.writes else ()
            ranks.meet()  # in patience: NCCL, where a group ends, has little
        return Result(job.plan, run.manifest.mtp, notes)


def _as_before(run: Run, request: Request) -> Request:
    """Where no flag says how, the head that there is, or goes on, is meant."""
    bare = request.wishes == HeadWishes()
    return replace(request, wishes=Request.recorded(run, request.run).wishes) if bare else request


def _planned(run: Run, request: Request, progress: Progress) -> HeadJob:
    """Raises NoHead where the base has none and none is to be made, UsageError where an earlier step is missing."""
    from sparkctl.data.tokens import TokenStore, stored_digest
    from sparkctl.hardware.shape import Shape
    from sparkctl.model import mtp
    from sparkctl.model.inspect import inspect, text_part
    from sparkctl.mtp.source import NoHead, from_folder, require_promise

    rate = request.wishes.learning_rate
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(
            f"a learning rate of {rate:g} trains nothing",
            replace(request, wishes=replace(request.wishes, learning_rate=1e-4)).again(),
        )
    model, _, analysis = analysed(run)
    if run.manifest.plan is None:
        raise UsageError(f"no [plan] in `{request.run}`", f"sparkctl recommend {quoted(request.run)}")
    if analysis.digest not in (None, stored_digest(run.root / TOKENS)):
        raise UsageError(f"`{run.root / TOKENS}` is not what `analyze` wrote", analyze_command(run, "--force"))
    base = model_folder(run, model, progress)
    require_promise(base, model.source)
    shipped: HeadSource | None = None
    try:
        shipped = from_folder(base, mtp.shapes(text_part(inspect(base, allow_unknown=True).config)), model.source)
    except NoHead as missing:
        if not request.wishes.fresh:
            raise NoHead(missing.message, request.again("--fresh")) from None
    merged, seal = merged_model(run, request.run)
    info = inspect(merged, allow_unknown=True)
    plan = plan_head(
        run.manifest.plan, Shape.from_config(info.config, info.text_parameters), TokenStore.open(run.root / TOKENS),
        request.wishes, model.config_sha256,
    )  # fmt: skip
    entry = merged_entry(run, merged)
    made_from = head_fingerprint(plan, analysis.digest, seal.digest, shipped)
    return HeadJob(
        run,
        plan,
        model.config_sha256,
        merged,
        seal.digest,
        shipped,
        entry.id if entry else "merged",
        made_from,
        request.again(),
        request.allow_slow,
    )


def _done(job: HeadJob, request: Request) -> bool:
    """Whether this head is there already. Raises UsageError where another one is."""
    table = job.run.manifest.mtp
    if table is None or table.mode == "skipped":
        return False
    if table.made_from != job.made_from:
        if not state.listed(job.checkpoints):
            return False
        raise UsageError(
            f"`{request.run}` has a head that was trained {_otherwise(job, table)}",
            f"`{request.again('--force')}` begins anew",
        )
    return table.head is not None and job.head.is_file() and sha256_file(job.head) == table.digest


def _otherwise(job: HeadJob, table: MtpTable) -> str:
    """What tells the head that is there from the one that is asked for."""
    if table.merged != job.merged_digest:
        return "for another merged model"
    alike = table.plan and plan_settings(table.plan) == plan_settings(job.plan)
    return "on other data" if alike else f"with other flags: bare, `sparkctl mtp train {quoted(job.run.root)}` keeps it"


def _train(job: HeadJob, ranks: Ranks, force: bool, progress: Progress) -> None:
    """The training, unless it is at its end already and only what follows is missing."""
    table, start = job.run.manifest.mtp, None
    trained = table.train if table and table.made_from == job.made_from and not force else None
    if trained:
        start = newest_whole(job, progress)
        if trained.status == "done" and start and start.name == trained.last_checkpoint:
            at, _ = state.with_whole_best(state.read_state(start), job.checkpoints)
            if at.best_checkpoint == trained.best_checkpoint:
                return
        progress.say(f"going on from {start.name}" if start else "nothing whole was saved: beginning anew")

    def record(manifest: Manifest) -> None:
        if trained and manifest.mtp:
            manifest.mtp.resumes = [*manifest.mtp.resumes, resumed(start, trained.ended_by)]

    carry_out(job, start, ranks, progress, record)


@contextmanager
def _trained(request: Request) -> Iterator[None]:
    """Ctrl-C or SIGTERM in here: the command that goes on is without `--force`, which would train anew."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        message = "interrupted: the head is trained, and not measured yet"
        raise Interrupted(message, request.again(), number) from stop


def _settle(job: HeadJob, request: Request, progress: Progress) -> tuple[str, ...]:
    """Write the best head, measure it beside the shipped one, and put the shipped one there where it is better."""
    from sparkctl.model.weights import TensorFile
    from sparkctl.mtp.accept import helps

    trained = job.before
    assert trained
    assert trained.best_checkpoint
    best = TensorFile(job.checkpoints / trained.best_checkpoint / state.TRAINABLE)
    _write(job, dict.fromkeys(best.names(), best))
    rows, notes = _measured(job, request, progress)
    named = {row.name: row for row in rows}
    before, after = named.get(mtp_eval.SHIPPED), named.get(mtp_eval.TRAINED)
    if before and not before.drafts:  # answers of one token
        notes.append("no answer has a draft in it, so nothing tells whether training helped: the trained head is kept")
        before = None
    losses = _losses(job, trained)
    helped = before is None or (after is not None and helps(before, after, losses))  # None: the base's, to the bit
    if helped and losses and before and after and before.mean_accepted == after.mean_accepted:
        notes.append(ALIKE.format(*losses))
    if not helped and job.shipped:
        _write(job, job.shipped.tensors)
        notes.append(mtp_eval.NOT_HELPED)
    with job.run.edit() as manifest:
        assert manifest.mtp
        manifest.mtp.mode = "trained" if helped else "shipped"
        manifest.mtp.head, manifest.mtp.digest = HEAD, sha256_file(job.head)
        manifest.mtp.acceptance = rows
    return tuple(notes)


def _losses(job: HeadJob, trained: TrainTable) -> tuple[float, float] | None:
    """Held-out loss of the shipped head and of the best trained one; None where they were not measured."""
    before, best = trained.first_eval_loss, trained.best_eval_loss
    if job.plan.fresh or before is None or best is None:  # fresh: the loss before is that of random weights
        return None
    return before, best


def _write(job: HeadJob, tensors: Mapping[str, TensorFile]) -> None:
    """The 15 tensors as one file, in the dtypes that the base's head has, bf16 where it has none."""
    from sparkctl.model.format import torch_dtype
    from sparkctl.model.weights import ShardWriter

    kept = {name: file.dtype(name) for name, file in job.shipped.tensors.items()} if job.shipped else {}
    kinds = {name: (torch_dtype(kept.get(name, "BF16")), tensors[name].shape(name)) for name in sorted(tensors)}
    with staged_file(job.head) as stage, ShardWriter(stage, kinds) as writer:
        for name, (dtype, _) in kinds.items():
            writer.write(name, tensors[name].read(name).to(dtype))


def _measured(job: HeadJob, request: Request, progress: Progress) -> tuple[list[Acceptance], list[str]]:
    """Rows of `mtp eval`, and what is to be said where there are none."""
    asked = mtp_eval.Request(request.run, prompts=request.prompts, allow_slow=request.allow_slow)
    asked_job = mtp_eval.gather(job.run, asked, job.head, progress=progress)
    if not asked_job.prompts:
        return [], ["nothing is held out, so nothing tells whether training helped: the trained head is kept"]
    return mtp_eval.measure(asked_job, progress=progress), list(asked_job.notes)
