"""`sparkctl recommend`: a flag for each of the schema's choices, and the plan as a person reads it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from pydantic import ValidationError
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparkctl.cli import console, onward
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, RunArg
from sparkctl.cli.train import whole_time
from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Choices, PlanTable
from sparkctl.manifest.store import describe
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.words import heading, size

if TYPE_CHECKING:
    from sparkctl.steps.recommend import Result

AUTO = {"mode": Literal["auto", Mode], "engine": Literal["auto", EngineName]}  # "auto" leaves it to the rules


def register(app: typer.Typer) -> None:
    """Add the command, with its own options and one for each field of `Choices`."""

    def command(run: Path, recipe: str | None, json: bool, dry_run: bool, force: bool, **choices: Any) -> None:
        """Plan the training: every choice with its reason, and what it costs on this machine."""
        recommend(run, choices, recipe, json=json, dry_run=dry_run, force=force)

    own: dict[str, tuple[Any, Any]] = {
        "recipe": (Annotated[Optional[str], typer.Option(help="Name or file of a recipe.")], None),  # noqa: UP045
        "json": (JsonOpt, False),
        "dry_run": (DryRunOpt, False),
        "force": (ForceOpt, False),
    }
    options = {name: (_option(name), None) for name in Choices.model_fields} | own
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=RunArg)]
        + [inspect.Parameter(n, keyword, annotation=a, default=d) for n, (a, d) in options.items()]
    )
    command.__annotations__ = {}
    app.command("recommend")(command)


def _option(name: str) -> Any:
    """The flag of a choice: type and help are the field's; a field that is true or false has a `--no-` too."""
    field, flag = Choices.model_fields[name], f"--{name.replace('_', '-')}"
    both = f"{flag}/--no-{flag[2:]}" if field.annotation == bool | None else flag
    kind = Optional[AUTO[name]] if name in AUTO else field.annotation  # noqa: UP045
    return Annotated[kind, typer.Option(both, help=field.description, show_default=False)]


def recommend(
    run: Path, choices: dict[str, Any], recipe: str | None, *, json: bool, dry_run: bool, force: bool
) -> None:
    """Plan the run and print the plan."""
    from sparkctl.steps.recommend import Request
    from sparkctl.steps.recommend import recommend as work

    auto = frozenset(name for name in AUTO if choices[name] == "auto")
    try:
        flags = Choices(**{name: value for name, value in choices.items() if name not in auto})
    except ValidationError as error:
        raise UsageError(f"flags do not hold:\n{describe(error)}", "sparkctl recommend --help") from None
    progress = console.progress()
    result = work(Request(run, flags, auto, recipe), force=force, dry_run=dry_run, progress=progress)
    if result.up_to_date:
        progress.say(f"up to date: `{run}` has this plan already")
    onward.answer(run, _json(result, dry_run), _human(result, dry_run), json=json, more=not dry_run)


def _json(result: Result, dry_run: bool) -> dict[str, Any]:
    status = {"ok": True, "run": str(result.run), "up_to_date": result.up_to_date, "dry_run": dry_run}
    return {**status, "plan": result.plan.model_dump(mode="json", exclude_none=True)}


def _human(result: Result, dry_run: bool) -> Group:
    plan = result.plan
    title = f"plan of {result.run.absolute().name}"
    title = heading(title, dry_run=dry_run, up_to_date=result.up_to_date, made=plan.created)
    table = Table(box=None, pad_edge=False)
    for column in ("choice", "value", "from", "why"):
        table.add_column(column, overflow="fold", no_wrap=column != "why", style="dim" if column != "value" else None)
    for name in (name for name in Choices.model_fields if name in plan.origin):
        cells = (name.replace("_", " "), _value(plan, name), plan.origin[name], plan.reasons[name])
        table.add_row(*map(Text, cells))
    costs = plan.estimates
    head = ", the MTP head's checkpoints and the served folder" if costs.head_seconds else ""
    head_time = f"{console.duration(costs.head_seconds)} more, for `mtp train`" if costs.head_seconds else None
    memory = ", ".join(f"{name} {size(value)}" for name, value in costs.memory if value)
    estimates = console.rows(
        f"on {plan.machine.name}, {size(plan.machine.memory)}",
        ("steps", f"{costs.steps:,}, packs a step: {plan.gradient_accumulation}, warm-up: {plan.warmup_steps}"),
        ("time", whole_time(costs.seconds, costs.start_seconds)),
        ("rate", f"{costs.tokens_per_second:,.0f} tok/s: {costs.throughput_from}"),
        *([("MTP head", head_time)] if head_time else []),
        ("memory", f"{size(costs.peak_memory)} at its peak: {memory}"),
        ("disk", f"{size(costs.disk)}: tokens, checkpoints, the merged model{head}"),
        ("trained", f"{costs.trainable_parameters:,} parameters"),
    )
    return Group(console.titled(title, table), "", estimates)


def _value(plan: PlanTable, name: str) -> str:
    if name == "warmup_fraction":
        return f"{plan.warmup_steps} steps"
    nested = {"lora_r": plan.lora.r, "lora_alpha": plan.lora.alpha} if plan.lora else {}
    value = nested[name] if name in nested else getattr(plan, name)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"
