"""`sparkctl mtp`: the MTP head that drafts tokens for a server, and what a person sees of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparkctl import env
from sparkctl.cli import acceptance, console, heads, onward, served
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, RunArg, SlowOpt, about
from sparkctl.manifest.schema import MOST_EPOCHS, Choices, HeadPlan
from sparkctl.manifest.table import HeadLoss

HELP = "The MTP head, which drafts tokens for a server: train it, measure it, put it into the merged model."
group = typer.Typer(help=HELP)

PromptsOpt = Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts to answer.")]


def register(app: typer.Typer) -> None:
    """Add the command's parts."""
    app.add_typer(group, name="mtp")


@group.command("train")
def train(
    run: RunArg,
    steps: Annotated[int, typer.Option("--steps", min=1, max=8, help=about(HeadPlan, "draft_steps"))] = 3,
    loss: Annotated[HeadLoss, typer.Option("--loss", help=about(HeadPlan, "loss"))] = "kl",
    fresh: Annotated[bool, typer.Option("--fresh", help=about(HeadPlan, "fresh"))] = False,
    pack_length: Annotated[int | None, typer.Option(min=1, help=about(Choices, "pack_length"))] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=MOST_EPOCHS, help=about(Choices, "epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help=about(Choices, "max_steps"))] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help=about(Choices, "learning_rate"))] = None,
    prompts: PromptsOpt = 64,
    allow_slow: SlowOpt = False,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """Train the head for the merged model, whose weights stay as they are; again, it goes on where it stopped."""
    from sparkctl.plan.heads import HeadWishes
    from sparkctl.steps.mtp_train import mtp_train
    from sparkctl.steps.mtp_training import Request

    wishes = HeadWishes(steps, loss, fresh, pack_length, epochs, max_steps, learning_rate)
    progress = console.progress()
    result = mtp_train(Request(run, wishes, prompts, allow_slow), force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: the head of `{run}` is trained")
    if env.rank() == 0:
        answer = {"ok": True, "run": str(run), "dry_run": dry_run, **heads.as_json(result)}
        onward.answer(run, answer, heads.as_text(result, dry_run), json=json, more=not dry_run)


@group.command("eval")
def evaluate(
    run: RunArg,
    prompts: PromptsOpt = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens of the longest answer.")] = 128,
    draft_length: Annotated[int, typer.Option("--draft-length", min=1, max=16, help="Tokens of a draft.")] = 3,
    allow_slow: SlowOpt = False,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """How much a server accepts of what the head drafts: before tuning, after it, with the trained head."""
    from sparkctl.steps.mtp_eval import Request, mtp_eval

    request, progress = Request(run, prompts, max_tokens, draft_length, allow_slow), console.progress()
    result = mtp_eval(request, force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: the heads of `{run}` are measured")
    answer = {"ok": True, "run": str(run), "dry_run": dry_run, **acceptance.as_json(result)}
    console.answer(answer, acceptance.as_text(result, dry_run), json=json)


@group.command()
def inject(
    run: RunArg,
    mode: Annotated[
        Literal["trained", "default"],
        typer.Option("--mode", help="The run's trained head, or the base's as published."),
    ],
    into: Annotated[
        Path | None, typer.Option("--into", help="A model's folder in place of the merged one, by any tool.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Folder or hub id with the published head, in place of the base.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; served/ in the run.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard links of untouched shards, no copies.")] = False,
    json: JsonOpt = False,
    dry_run: DryRunOpt = False,
    force: ForceOpt = False,
) -> None:
    """Write the merged model with an MTP head as one folder that vLLM drafts with."""
    from sparkctl.steps.injection import Request
    from sparkctl.steps.mtp_inject import inject as work

    progress = console.progress()
    result = work(Request(run, mode, into, source, out, link), force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: `{result.folder}` holds this head")
    answer = {"ok": True, "run": str(run), "dry_run": dry_run, **asdict(result)}
    console.answer(answer, served.as_text(result, dry_run), json=json)
    if result.serve and not json:
        typer.echo(f"\n{result.serve}")  # whole, to be copied: a table would break it
