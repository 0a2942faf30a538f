"""`sparkctl show`: where a run stands, step by step, and the rounds it came from. Reads alone; loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparkctl.data.tokens import stored_digest
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.lineage import ancestors, missing_parent
from sparkctl.manifest.schema import MergeTable, MtpTable, ServedTable
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import sealed_as
from sparkctl.model import mtp
from sparkctl.mtp.inject import ServedSeal
from sparkctl.steps import injection, merge
from sparkctl.steps.inputs import TOKENS, analyze_command, recommend_command
from sparkctl.steps.merge import TABLES
from sparkctl.steps.mtp_training import Request as HeadRequest
from sparkctl.steps.training import Job, check_fresh, complete, planned
from sparkctl.words import counted, here, quoted

Status = Literal["done", "not run", "running", "stopped", "stale"]
BROKEN = "; the folder is not what was written"
# what is made from what: a step before the one that it needs would be refused, or made in vain
NEEDS = {
    "recommend": "analyze", "train": "recommend", "merge": "train", "adapter": "train", "adapter, text": "train",
    "mtp train": "merge", "mtp inject": "merge",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of a run. `mend`: the command that brings it further; None where there is nothing to do, or another
    step comes first.
    """

    name: str
    status: Status
    detail: str = ""
    mend: str | None = None
    problem: str = ""  # why it is not done, behind the detail


@dataclass(frozen=True)
class Shown:
    """A run, its steps in their order, and its rounds from this one back to the first."""

    run: Run
    steps: list[Step]
    rounds: list[Run]
    missing_parent: str | None  # a parent that is recorded and cannot be opened

    @property
    def mends(self) -> list[str]:
        """The commands that bring the run further, in order. No step needs an adapter, so that comes last."""
        return _mends(self.steps)

    def values(self) -> dict[str, Any]:
        """The manifest as plain values, under its own names."""
        return self.run.manifest.model_dump(mode="json", by_alias=True, exclude_none=True)


def show(folder: Path) -> Shown:
    """What `folder` holds. Raises UsageError where it is no run."""
    run = Run.open(folder)
    rounds = [run, *ancestors(run)]
    return Shown(run, _steps(run, folder), rounds, missing_parent(rounds[-1]))


def next_command(folder: Path) -> str | None:
    """The command that brings the run in `folder` further; None where every step is done."""
    return next(iter(_mends(_steps(Run.open(folder), folder))), None)


def _mends(steps: list[Step]) -> list[str]:
    return [step.mend for step in sorted(steps, key=lambda step: step.name.startswith("adapter")) if step.mend]


def _steps(run: Run, shown: Path) -> list[Step]:
    """In their order. shown: the run as the user named it."""
    running = run.running()
    trained = _train(run, shown)
    merges = _merges(run, shown, trained)
    steps = [_analyze(run, shown), _recommend(run, shown), trained, *merges, *_heads(run, shown, merges[0])]
    if running:
        name = "train" if running == "resume" else running
        steps = [Step(s.name, "running", s.detail) if s.name == name else s for s in steps]
    return _in_order(steps)


def _in_order(steps: list[Step]) -> list[Step]:
    """The steps, each with its command only where all that it needs is done; what was broken can be made anew."""
    done, ordered = {""}, []
    for step in steps:
        ready = NEEDS.get(step.name, "") in done
        done |= {step.name} if ready and step.status == "done" else set()
        ordered.append(step if ready or step.problem == BROKEN else replace(step, mend=None))
    return ordered


def get(shown: Shown, key: str) -> Any:
    """The manifest's value under a dotted key: `plan.pack_length`, `checkpoints.0.id`. Raises UsageError naming what
    is there."""
    value: Any = shown.values()
    at = "the manifest"
    for part in key.split("."):
        known = list(value) if isinstance(value, dict) else [str(i) for i in range(len(value))]
        if part not in known:
            there = f"it has {', '.join(known)}" if known else "it is empty"
            raise UsageError(
                f"no `{part}` in {at} of `{shown.run.root}`: {there}", f"sparkctl show {quoted(shown.run.root)}"
            )
        value = value[part] if isinstance(value, dict) else value[int(part)]
        at = f"`{part}`"
        if not isinstance(value, dict | list):
            value = _Leaf(value)
    return value.value if isinstance(value, _Leaf) else value


@dataclass(frozen=True)
class _Leaf:
    """A value that has no keys: a further part of the key finds none."""

    value: Any

    def __len__(self) -> int:
        return 0


def _analyze(run: Run, shown: Path) -> Step:
    analysis = run.manifest.analysis
    if analysis is None:
        return Step("analyze", "not run", mend=f"sparkctl analyze DATA --run {quoted(shown)} --model MODEL")
    detail = f"{counted(analysis.examples, 'example')}, {counted(analysis.tokens, 'token')}"
    if stored_digest(run.root / TOKENS) != analysis.digest:
        mend = analyze_command(run, "--force", shown=shown)
        return Step("analyze", "stale", detail, mend, "; tokens/ is not what was written")
    return Step("analyze", "done", detail)


def _recommend(run: Run, shown: Path) -> Step:
    plan, mend = run.manifest.plan, recommend_command(run, shown=shown)
    if plan is None:
        return Step("recommend", "not run", mend=mend)
    detail = f"{plan.mode}, {plan.engine}, {plan.steps:,} steps of {plan.gradient_accumulation} × {plan.pack_length:,}"
    try:
        check_fresh(run, plan)
    except SparkError:
        return Step("recommend", "stale", detail, mend, "; the analysis changed since")
    return Step("recommend", "done", detail)


def _train(run: Run, shown: Path) -> Step:
    trained = run.manifest.train
    if trained is None:
        return Step("train", "not run", mend=f"sparkctl train {quoted(shown)}")
    detail = f"step {trained.step:,} of {trained.steps:,}"
    if trained.best_eval_loss is not None:
        detail += f", best held-out loss {trained.best_eval_loss:.4f} ({trained.best_checkpoint})"
    if trained.gate:
        detail += ", through the gate" if trained.gate.passed else ", not let through by the gate"
    job = _job(run)
    if job is None or job.made_from != trained.made_from:
        return Step("train", "stale", detail, f"sparkctl train {quoted(shown)} --force", "; plan or data changed since")
    if trained.status == "done" and not complete(job):
        return Step("train", "stopped", detail, f"sparkctl resume {quoted(shown)}", "; a checkpoint is damaged or gone")
    if trained.status == "done":
        return Step("train", "done", detail)
    return Step("train", "stopped", detail, f"sparkctl resume {quoted(shown)}", f", {trained.ended_by}")


def _job(run: Run) -> Job | None:
    try:
        return planned(run)
    except SparkError:
        return None


def _merges(run: Run, shown: Path, trained: Step) -> list[Step]:
    """The merged model, and each adapter that was written: of the multimodal class, of the text-only one."""
    steps = []
    for adapter, kind in TABLES.items():
        table: MergeTable | None = getattr(run.manifest, kind)
        if table or adapter is None:
            mend = merge.recorded(run, shown, adapter).again()
            steps.append(_merge(kind.replace("_", ", "), run, table, trained, mend))
    return steps


def _heads(run: Run, shown: Path, merged: Step) -> list[Step]:
    """The MTP head and the served model; nothing where the model has none to speak of."""
    manifest = run.manifest
    may = manifest.model and manifest.model.model_type in mtp.TYPES and manifest.merge
    if manifest.mtp is None and not may:
        return []
    steps = [_head(run, manifest.mtp, merged, HeadRequest.recorded(run, shown).again())]
    if manifest.served:
        steps.append(
            _served(run, manifest.served, merged, steps[0], injection.recorded(run, shown, manifest.served).again)
        )
    elif manifest.mtp is None or manifest.mtp.mode != "skipped":
        mend = injection.Request(shown, "trained").again() if steps[0].status == "done" else None
        steps.append(Step("mtp inject", "not run", mend=mend))
    return steps


def _head(run: Run, table: MtpTable | None, merged: Step, mend: str) -> Step:
    if table is None:
        return Step("mtp train", "not run", mend=mend)
    if table.mode == "skipped":
        return Step("mtp train", "done", f"skipped: {table.skipped}")
    trained = table.train
    detail = f"step {trained.step:,} of {trained.steps:,}" if trained else ""
    if problem := _another_model(run, table.merged, merged):
        return Step("mtp train", "stale", detail, f"{mend} --force", problem)
    if table.mode == "training":
        return Step("mtp train", "stopped", detail, mend, ", and not measured yet")
    if table.acceptance:
        best = table.acceptance[-1]
        detail += f", {best.mean_accepted:.2f} tokens of {len(best.cumulative)} accepted a draft"
    detail += "; it did not help, the base's head was kept" if table.mode == "shipped" else ""
    if table.head is None or not run.resolve(table.head).is_file():
        return Step("mtp train", "stale", detail, mend, "; its file is gone")
    return Step("mtp train", "done", detail)


def _another_model(run: Run, digest: str | None, merged: Step) -> str:
    """Why what was made for the merged model of that digest is untrue by now; empty where it is not."""
    if merged.status == "stale":
        return "; the merged model is stale"
    table = run.manifest.merge
    seal = sealed_as(run.resolve(table.folder), table.made_from) if table else None
    return "; the merged model is another one by now" if seal and digest not in (None, seal.digest) else ""


def _served(run: Run, table: ServedTable, merged: Step, head: Step, again: Callable[..., str]) -> Step:
    folder, mend = run.resolve(table.folder), None
    if table.mode == "default" or head.status == "done":
        mend = again("--force")
    whose = "the base's head, since training did not help" if table.shipped else f"{table.mode} head"
    detail = f"{whose}, {counted(table.draft_length, 'token')} to draft → {here(folder)}"
    if sealed_as(folder, table.made_from, ServedSeal) is None:
        return Step("mtp inject", "stale", detail, mend, BROKEN)
    if table.merged and (problem := _another_model(run, table.merged, merged)):
        return Step("mtp inject", "stale", detail, mend, problem)
    if table.mode == "trained" and head.status == "stale":
        return Step("mtp inject", "stale", detail, mend, "; the head is stale")
    return Step("mtp inject", "done", detail)


def _merge(name: str, run: Run, table: MergeTable | None, training: Step, mend: str) -> Step:
    if table is None:
        return Step(name, "not run", mend=mend)
    folder, trained = run.resolve(table.folder), run.manifest.train
    entry = run.manifest.checkpoint(table.checkpoint)
    gone = " (not there)" if entry and not run.resolve(entry.path).exists() else ""
    detail = f"{table.checkpoint}{gone} → {here(folder)}"
    if sealed_as(folder, table.made_from) is None:
        return Step(name, "stale", detail, f"{mend} --force", BROKEN)
    if better := merge.superseded(run, table):
        return Step(name, "stale", detail, mend, f"; the {table.asked} checkpoint is {better} by now")
    if trained and not run.manifest.checkpoint(table.checkpoint):
        return Step(name, "stale", detail, f"{mend} --force", "; that checkpoint is gone")
    if entry and table.digest not in (None, entry.digest):
        return Step(name, "stale", detail, f"{mend} --force", "; that checkpoint was trained anew")
    if training.status == "stale":
        return Step(name, "stale", detail, f"{mend} --force", "; its training is stale")
    return Step(name, "done", detail)
