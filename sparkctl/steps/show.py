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
from sparkctl.steps.training import check_fresh, planned

Status = Literal["done", "not run", "running", "stopped", "stale"]


@dataclass(frozen=True)
class Step:
    """One step of a run. `mend`: the command that brings it further; None where there is nothing to do."""

    name: str
    status: Status
    detail: str = ""
    mend: str | None = None


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
    detail = f"{analysis.examples:,} examples, {analysis.tokens:,} tokens"
    if stored_digest(run.root / "tokens") != analysis.digest:
        mend = f"sparkctl analyze DATA --run {shown} --force"
        return Step("analyze", "stale", f"{detail}; tokens/ is not what was written", mend)
    return Step("analyze", "done", detail)


def _recommend(run: Run, shown: Path) -> Step:
    plan, mend = run.manifest.plan, f"sparkctl recommend {shown}"
    if plan is None:
        return Step("recommend", "not run", mend=mend)
    detail = f"{plan.mode}, {plan.engine}, {plan.steps:,} steps of {plan.gradient_accumulation} × {plan.pack_length:,}"
    try:
        check_fresh(run, plan)
    except SparkError:
        return Step("recommend", "stale", f"{detail}; the analysis changed since", mend)
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
    if not _same_job(run, trained.made_from):
        return Step("train", "stale", f"{detail}; plan or data changed since", f"sparkctl train {shown} --force")
    if trained.status == "done":
        return Step("train", "done", detail)
    why = "killed" if trained.status == "running" else trained.status
    return Step("train", "stopped", f"{detail}, {why}", f"sparkctl resume {shown}")


def _same_job(run: Run, made_from: str) -> bool:
    try:
        return planned(run).made_from == made_from
    except SparkError:
        return False


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
    detail = f"{table.checkpoint} → {table.folder}"
    seal = read_seal(folder)
    if seal is None or seal.made_from != table.made_from or not intact(folder, seal):
        return Step(name, "stale", f"{detail}; the folder is not what was written", f"{mend} --force")
    if trained and not run.manifest.checkpoint(table.checkpoint):
        return Step(name, "stale", f"{detail}; that checkpoint is gone", f"{mend} --force")
    return Step(name, "done", detail)
