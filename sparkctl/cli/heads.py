"""What a person and a script see of `sparkctl mtp train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from sparkctl.cli import acceptance, console
from sparkctl.cli.train import trained, whole_time
from sparkctl.manifest.schema import HeadPlan
from sparkctl.words import counted, earlier, size

if TYPE_CHECKING:
    from sparkctl.steps.mtp_train import Result

KEPT = {"trained": "the trained one", "shipped": "the base's, since training did not help"}


def as_json(result: Result) -> dict[str, Any]:
    """The answer under --json."""
    return {
        "up_to_date": result.up_to_date,
        "skipped": result.skipped,
        "plan": result.plan.model_dump(mode="json") if result.plan else None,
        "mtp": result.mtp.model_dump(mode="json") if result.mtp else None,
        "notes": list(result.notes),
    }


def as_text(result: Result, dry_run: bool) -> RenderableType:
    """The training and the rows of acceptance; under --dry-run what would be done."""
    from sparkctl.steps.mtp_eval import NOT_HELPED

    if result.skipped:
        return console.rows("mtp train", ("skipped", result.skipped))
    going = not (result.mtp and result.mtp.train) or (dry_run and not result.up_to_date)
    if result.plan and going:
        return _planned(result.plan)
    assert result.mtp
    assert result.mtp.train
    title = earlier("mtp train", result.made) if result.up_to_date else "mtp train"
    parts, rows = [trained(result.mtp.train, title=title)], result.mtp.acceptance
    if rows:
        parts.append(console.titled(acceptance.heading(rows[0].prompts), acceptance.table(rows)))
    kept = KEPT.get(result.mtp.mode, result.mtp.mode)
    notes = [("note", note) for note in result.notes if note != NOT_HELPED]
    return Group(*parts, console.rows("", ("head", f"{kept}: {result.mtp.head}"), *notes))


def _planned(plan: HeadPlan) -> RenderableType:
    return console.rows(
        "mtp train (dry run: nothing written)",
        ("steps", f"{plan.steps:,}, each {counted(plan.gradient_accumulation, 'pack')} of {plan.pack_length:,} tokens"),
        ("drafts", f"{plan.draft_steps} a row, each weighing {plan.decay:g} of the one before; loss {plan.loss}"),
        ("learning rate", f"{plan.learning_rate:g}"),
        ("time", f"about {whole_time(plan.estimated_seconds, plan.estimated_start_seconds)}"),
        ("peak memory", size(plan.estimated_peak_memory)),
    )
