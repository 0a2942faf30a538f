"""`sparkctl resume`: its options; the answer is that of `train`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkctl import env
from sparkctl.cli import console, onward
from sparkctl.cli.options import DryRunOpt, JsonOpt, RunArg, SlowOpt
from sparkctl.cli.train import trained
from sparkctl.words import earlier


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(resume)


def resume(
    run: RunArg,
    checkpoint: Annotated[
        str | None, typer.Option("--from", metavar="ID", help="Go on from this checkpoint, not from the newest.")
    ] = None,
    allow_slow: SlowOpt = False,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
) -> None:
    """Go on with a training that was interrupted, failed or killed, as if it had never stopped."""
    from sparkctl.steps.resume import resume as work

    progress = console.progress()
    result = work(run, checkpoint=checkpoint, allow_slow=allow_slow, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: the training of `{run}` is finished")
    title = f"would go on from {result.checkpoint or 'the beginning'} (dry run: nothing written)"
    if result.up_to_date:
        title = earlier("trained", result.made)
    human = trained(result.train, title if dry_run or result.up_to_date else None)
    answer = {
        "ok": True, "run": str(result.run), "up_to_date": result.up_to_date, "dry_run": dry_run,
        "checkpoint": result.checkpoint, "train": result.train.model_dump(mode="json"),
    }  # fmt: skip
    if env.rank() == 0:
        onward.answer(run, answer, human, json=json, more=not dry_run)
