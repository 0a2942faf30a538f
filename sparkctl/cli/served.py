"""What `sparkctl mtp inject` shows a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from sparkctl.cli import console
from sparkctl.cli.heads import KEPT
from sparkctl.words import counted, heading, size

if TYPE_CHECKING:
    from sparkctl.steps.mtp_inject import Result


def as_text(result: Result, dry_run: bool) -> RenderableType:
    """The folder, whose head is in it, and why a server should draft so many tokens."""
    title = heading("mtp inject", dry_run=dry_run, up_to_date=result.up_to_date, made=result.created)
    if result.skipped:
        return console.rows(title, ("skipped", result.skipped))
    linked = f", {counted(result.linked, 'shard')} linked" if result.linked else ""
    return console.rows(
        title,
        ("head", f"{KEPT['shipped'] if result.shipped else result.mode}, from {result.source}"),
        ("model", result.model),
        ("folder", result.folder),
        ("tensors", f"{result.tensors:,}"),
        ("size", size(result.bytes) + linked),
        *([("links", result.unlinked)] if result.unlinked else []),
        ("time", console.duration(result.seconds)),
        ("drafts", result.reason),
    )
