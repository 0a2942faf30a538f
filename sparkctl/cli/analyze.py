"""`sparkctl analyze`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkctl.cli import analysis, console, onward
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, about
from sparkctl.manifest.schema import DataTable, ModelTable, RunTable


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(analyze)


def analyze(
    data: Annotated[list[Path], typer.Argument(metavar="DATA", help="JSONL, .jsonl.gz or Parquet files of chats.")],
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="The run's folder; made where absent.")],
    model: Annotated[str | None, typer.Option("--model", help="Model folder or hub id.")] = None,
    parent: Annotated[Path | None, typer.Option("--parent", help="The run of the round before.")] = None,
    continues: Annotated[bool, typer.Option("--continue", help=about(RunTable, "continues"))] = False,
    recipe: Annotated[str | None, typer.Option("--recipe", help=about(DataTable, "recipe"))] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help=about(DataTable, "max_seq_length"))] = None,
    eval_fraction: Annotated[float | None, typer.Option(min=0, max=0.9, help=about(DataTable, "eval_fraction"))] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file in place of the model's template.")] = None,
    allow_unknown: Annotated[bool, typer.Option("--allow-unknown", help=about(ModelTable, "allow_unknown"))] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=about(DataTable, "skip_bad"))] = False,
    show: Annotated[int, typer.Option("--show", min=0, help="Print so many examples as the model sees them.")] = 0,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """Tokenise chat data once, hold a part out, and report what is in it."""
    from sparkctl.steps.analyze import analyze as work
    from sparkctl.steps.inputs import Request

    request = Request(
        data=tuple(data), run=run, model=model, parent=parent, continues=continues, recipe=recipe,
        max_seq_length=max_seq_length, eval_fraction=eval_fraction, chat_template=chat_template,
        allow_unknown=allow_unknown, skip_bad=skip_bad, show=show,
    )  # fmt: skip
    progress = console.progress()
    result = work(request, force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: `{run}` holds these examples already")
    for message in result.data.bad:
        progress.say(f"skipped: {message}")
    human = analysis.as_text(result, dry_run)
    onward.answer(run, analysis.as_json(result, dry_run), human, json=json, more=not dry_run)
