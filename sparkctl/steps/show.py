"""`sparkctl show`: where a run stands, step by step, and the rounds it came from. Reads alone; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparkctl.data.tokens import stored_digest
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.lineage import ancestors, missing_parent
from sparkctl.manifest.schema import MergeTable
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import intact, read_seal
from sparkctl.steps.inputs import analyze_command
from sparkctl.steps.training import Job, check_fresh, complete, planned
from sparkctl.words import counted, here

Status = Literal["done", "not run", "running", "stopped", "stale"]


@dataclass(frozen=True)
class Step:
    """One step of a run. `mend`: the command that brings it further; None where there is nothing to do."""

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

    def values(self) -> dict[str, Any]:
        """The manifest as plain values, under its own names."""
        return self.run.manifest.model_dump(mode="json", by_alias=True, exclude_none=True)


def show(folder: Path) -> Shown:
    """What `folder` holds. Raises UsageError where it is no run."""
    run = Run.open(folder)
    running = run.running()
    steps = [_analyze(run, folder), _recommend(run, folder), _train(run, folder), *_merges(run, folder)]
    if running:
        name = "train" if running == "resume" else running
        steps = [Step(s.name, "running", s.detail) if s.name == name else s for s in steps]
    rounds = [run, *ancestors(run)]
    return Shown(run, steps, rounds, missing_parent(rounds[-1]))


def get(shown: Shown, key: str) -> Any:
    """The manifest's value under a dotted key: `plan.pack_length`, `checkpoints.0.id`. Raises UsageError naming what
    is there."""
    value: Any = shown.values()
    at = "the manifest"
    for part in key.split("."):
        known = list(value) if isinstance(value, dict) else [str(i) for i in range(len(value))]
        if part not in known:
            there = f"it has {', '.join(known)}" if known else "it is empty"
            raise UsageError(f"no `{part}` in {at} of `{shown.run.root}`: {there}", f"sparkctl show {shown.run.root}")
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
        return Step("analyze", "not run", mend=f"sparkctl analyze DATA --run {shown} --model MODEL")
    detail = f"{counted(analysis.examples, 'example')}, {counted(analysis.tokens, 'token')}"
    if stored_digest(run.root / "tokens") != analysis.digest:
        mend = analyze_command(run, "--force", shown=shown)
        return Step("analyze", "stale", detail, mend, "; tokens/ is not what was written")
    return Step("analyze", "done", detail)


def _recommend(run: Run, shown: Path) -> Step:
    plan, mend = run.manifest.plan, f"sparkctl recommend {shown}"
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
        return Step("train", "not run", mend=f"sparkctl train {shown}")
    detail = f"step {trained.step:,} of {trained.steps:,}"
    if trained.best_eval_loss is not None:
        detail += f", best held-out loss {trained.best_eval_loss:.4f} ({trained.best_checkpoint})"
    if trained.gate:
        detail += ", through the gate" if trained.gate.passed else ", not let through by the gate"
    job = _job(run)
    if job is None or job.made_from != trained.made_from:
        return Step("train", "stale", detail, f"sparkctl train {shown} --force", "; plan or data changed since")
    if trained.status == "done" and not complete(job):
        return Step("train", "stopped", detail, f"sparkctl resume {shown}", "; a checkpoint is damaged or gone")
    if trained.status == "done":
        return Step("train", "done", detail)
    why = "killed" if trained.status == "running" else trained.status
    return Step("train", "stopped", detail, f"sparkctl resume {shown}", f", {why}")


def _job(run: Run) -> Job | None:
    try:
        return planned(run)
    except SparkError:
        return None


def _merges(run: Run, shown: Path) -> list[Step]:
    """The merged model, and the adapter where one was written."""
    manifest = run.manifest
    merged = _merge("merge", run, manifest.merge, f"sparkctl merge {shown}")
    if manifest.adapter is None:
        return [merged]
    return [merged, _merge("adapter", run, manifest.adapter, f"sparkctl merge {shown} --adapter-only")]


def _merge(name: str, run: Run, table: MergeTable | None, mend: str) -> Step:
    if table is None:
        return Step(name, "not run", mend=mend)
    folder, trained = run.resolve(table.folder), run.manifest.train
    entry = run.manifest.checkpoint(table.checkpoint)
    gone = " (not there)" if entry and not run.resolve(entry.path).exists() else ""
    detail = f"{table.checkpoint}{gone} → {here(folder)}"
    seal = read_seal(folder)
    if seal is None or seal.made_from != table.made_from or not intact(folder, seal):
        return Step(name, "stale", detail, f"{mend} --force", "; the folder is not what was written")
    if trained and not run.manifest.checkpoint(table.checkpoint):
        return Step(name, "stale", detail, f"{mend} --force", "; that checkpoint is gone")
    return Step(name, "done", detail)
