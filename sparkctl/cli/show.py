"""`sparkctl show`: a run, its steps and its lineage."""

from __future__ import annotations

import typer

from sparkctl.cli import console
from sparkctl.cli.options import JsonOpt, RunArg
from sparkctl.manifest.store import Run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(show)


def show(run: RunArg, json: JsonOpt = False) -> None:
    """Show a run, the state of its steps, and its lineage over rounds."""
    opened = Run.open(run)
    data = opened.manifest.model_dump(mode="json", by_alias=True, exclude_none=True)
    console.answer(data, console.rows(opened.manifest.run.name), json=json)
