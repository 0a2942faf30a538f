"""`sparkctl merge`: its options, and what a person sees of a merge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text
from typer.core import TyperCommand

from sparkctl.cli import console, onward
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, RunArg
from sparkctl.words import heading, here, size

if TYPE_CHECKING:
    from sparkctl.steps.merge import Result

BARE = "--adapter-only"


class _Merge(TyperCommand):
    """Typer's options take a value or none; this one may have it: bare, it means the multimodal class."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f"{BARE}=multimodal" if arg == BARE else arg for arg in args])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=_Merge)(merge)


def merge(
    run: RunArg,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a checkpoint's id.")] = "best",
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; merged/ or adapter/ in the run.")] = None,
    adapter_only: Annotated[
        Literal["multimodal", "text"] | None,
        typer.Option(BARE, help="The adapter alone, in peft's format; `=text`: for the text-only class."),
    ] = None,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """Write the trained model as one folder that vLLM and transformers load."""
    from sparkctl.steps.merge import Request
    from sparkctl.steps.merge import merge as work

    progress = console.progress()
    result = work(Request(run, checkpoint, out, adapter_only), force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: `{result.folder}` was made from {result.checkpoint}")
    status = {"ok": True, "run": str(run), "dry_run": dry_run}
    answer = {**status, **asdict(result), "folder": str(result.folder)}
    more = not dry_run and adapter_only is None  # an adapter is served as it is
    onward.answer(run, answer, _human(result, dry_run), json=json, more=more)


def _human(result: Result, dry_run: bool) -> RenderableType:
    title = heading("merge", dry_run=dry_run, up_to_date=result.up_to_date, made=result.created)
    rows = console.rows(
        title,
        ("checkpoint", result.checkpoint),
        ("folder", here(result.folder)),
        ("tensors", f"{result.changed_tensors:,} of {result.tensors:,} changed"),
        ("size", size(result.bytes)),
        ("time", console.duration(result.seconds)),
    )
    return Group(rows, Text(f"\n{result.serve}"))  # whole, to be copied: a table would break it
