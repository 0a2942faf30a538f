"""What `sparkctl mtp eval` shows: a table for a person, one object for a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from sparkctl.cli import console
from sparkctl.manifest.evidence import Acceptance
from sparkctl.words import counted, earlier

if TYPE_CHECKING:
    from sparkctl.steps.mtp_eval import Result

LEGEND = (
    "token: % accepted of those whose predecessors were / of all drafts; accepted: tokens a draft; length: with the "
    "one that the model adds"
)


def as_json(result: Result) -> dict[str, Any]:
    """Rates are shares of 1. `prompts`: the held-out examples that were asked, by row of the token store."""
    asked = [{"row": prompt.row, "place": prompt.place, "tokens": len(prompt.ids)} for prompt in result.prompts]
    rows = [row_json(row) for row in result.rows]
    return {
        "skipped": result.skipped, "up_to_date": result.up_to_date, "rows": rows, "prompts": asked,
        "wanted": result.names, "notes": result.notes, "seconds": result.seconds,
    }  # fmt: skip


def row_json(row: Acceptance) -> dict[str, Any]:
    """A row, and what it would be with shorter drafts."""
    rates = zip(row.conditional, row.cumulative, strict=True)
    every = zip([*row.shorter, row.cumulative], row.by_length, strict=True)
    return {
        **row.model_dump(exclude={"conditional", "cumulative", "shorter", "made_from"}),
        "mean_acceptance_length": row.mean_acceptance_length,
        "positions": [{"conditional": conditional, "cumulative": cumulative} for conditional, cumulative in rates],
        "by_draft_length": [
            {"draft_length": len(cumulative), "cumulative": cumulative, "mean_accepted": mean}
            for cumulative, mean in every
        ],
    }


def as_text(result: Result, dry_run: bool) -> RenderableType:
    """The rows, and what is not there."""
    if result.skipped:
        return console.rows("mtp eval", ("skipped", result.skipped))
    title = heading(len(result.prompts))
    if dry_run and not result.up_to_date:
        wanted = [("row", name) for name in result.names]
        return Group(console.rows(f"{title} (dry run: nothing measured)", *wanted), *map(escape, result.notes))
    if result.up_to_date:
        title = earlier(title, max((row.created for row in result.rows if row.created), default=None))
    return Group(console.titled(title, table(result.rows)), *map(escape, result.notes))


def heading(prompts: int) -> str:
    """The title of the rows."""
    return f"Accepted drafts, over {counted(prompts, 'held-out prompt')}"


def table(rows: list[Acceptance]) -> Table:
    """A line a row: by position conditional/cumulative in per cent, then the means."""
    made = Table(box=None, pad_edge=False, caption=LEGEND, caption_justify="left")
    longest = max((len(row.cumulative) for row in rows), default=0)
    made.add_column("head and model")
    for column in (*(f"token {i + 1}" for i in range(longest)), "accepted", "length"):
        made.add_column(column, justify="right")
    for row in rows:
        rates = [f"{100 * a:.1f}/{100 * b:.1f}" for a, b in zip(row.conditional, row.cumulative, strict=True)]
        means = (f"{row.mean_accepted:.2f}", f"{row.mean_acceptance_length:.2f}")
        made.add_row(row.name, *rates, *[""] * (longest - len(rates)), *means)
    return made
