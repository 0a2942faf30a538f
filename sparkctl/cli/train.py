"""`sparkctl train`: its options, and what a person sees of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from sparkctl import env
from sparkctl.cli import console, onward
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, RunArg, SlowOpt
from sparkctl.manifest.schema import Gate, PlanTable, TrainTable
from sparkctl.words import counted, earlier, size

if TYPE_CHECKING:
    from sparkctl.steps.train import Result


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    run: RunArg,
    gate: Annotated[float | None, typer.Option("--gate", min=0, help=Gate.model_fields["limit"].description)] = None,
    allow_slow: SlowOpt = False,
    no_certificate: Annotated[
        bool, typer.Option("--no-certificate", help="Begin a long training without `verify lossless`.")
    ] = False,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """Train as the plan says: checkpoints, metrics and the best held-out loss stay in the run."""
    from sparkctl.steps.train import train as work

    progress = console.progress()
    result = work(
        run, gate=gate, allow_slow=allow_slow, certificate=not no_certificate, force=force, dry_run=dry_run,
        progress=progress,
    )  # fmt: skip
    if result.up_to_date:
        progress.say(f"up to date: `{run}` is trained as planned")
    if result.train and result.up_to_date:
        human = trained(result.train, earlier("trained", result.made))
    else:
        human = trained(result.train) if result.train and not dry_run else planned(result.plan)
    if env.rank() == 0:
        onward.answer(run, _json(result, dry_run), human, json=json, more=not dry_run)


def trained(table: TrainTable, title: str | None = None) -> RenderableType:
    """A training for a person. title: else what state it is in."""
    from sparkctl.train.state import RECENT

    last = min(table.step, RECENT)
    pairs: list[tuple[str, object]] = [
        ("steps", f"{table.step:,} of {table.steps:,}, {table.tokens:,} tokens"),
        ("loss", f"{_loss(table.first_loss)} at the first step, {_loss(table.final_loss)} over the last {last}"),
        ("held-out loss", f"{_loss(table.first_eval_loss)} before, best {_loss(table.best_eval_loss)}"),
        ("best checkpoint", table.best_checkpoint or "none"),
        ("rate", f"{table.tokens_per_second or 0:,.0f} tokens per second, evaluations and saves included"),
        (
            "time",
            f"{console.duration(table.seconds)} of steps, evaluations and saves (estimated "
            f"{console.duration(table.estimated_seconds)}{'' if table.step == table.steps else ' for all'})",
        ),
        (
            "peak memory",
            f"{size(table.peak_memory or 0)} (estimated {size(table.estimated_peak_memory)})",
        ),
    ]
    if table.gate:
        verdict = "passed" if table.gate.passed else f"worse by more than the {table.gate.limit:.1%} allowed"
        pairs.append(("gate", f"{table.gate.loss:.4f} against the parent's {table.gate.parent_loss:.4f}: {verdict}"))
    return console.rows(title or ("trained" if table.status == "done" else table.status), *pairs)


def whole_time(seconds: float, start: float) -> str:
    """An estimate from the command's start. start: what precedes the first step; 0 in plans that do not note it."""
    return console.duration(seconds) + (f" (of them {console.duration(start)} to load and rehearse)" if start else "")


def planned(plan: PlanTable) -> RenderableType:
    """What would be trained."""
    return console.rows(
        "would train (dry run: nothing written)",
        ("mode", f"{plan.mode}, engine {plan.engine}"),
        (
            "steps",
            f"{plan.steps:,} of {counted(plan.gradient_accumulation, 'pack')} of up to {plan.pack_length:,} tokens",
        ),
        ("time", f"{whole_time(plan.estimates.seconds, plan.estimates.start_seconds)} estimated"),
        ("peak memory", f"{size(plan.estimates.peak_memory)} estimated"),
        ("disk", f"{size(plan.estimates.disk)} estimated"),
    )


def _json(result: Result, dry_run: bool) -> dict[str, Any]:
    table = result.train.model_dump(mode="json") if result.train else None
    return {"ok": True, "run": str(result.run), "up_to_date": result.up_to_date, "dry_run": dry_run, "train": table}


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
