"""`sparkctl show`: a run, its steps and its lineage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from sparkctl.cli import console, onward
from sparkctl.cli.options import JsonOpt, RunArg
from sparkctl.words import counted, here

if TYPE_CHECKING:
    from sparkctl.manifest.schema import Checkpoint
    from sparkctl.manifest.store import Run
    from sparkctl.steps.show import Shown, Step

COLOURS = {"done": "green", "running": "cyan", "stopped": "yellow", "stale": "yellow", "not run": "dim"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(show)


def show(
    run: RunArg,
    get: Annotated[
        str | None, typer.Option("--get", metavar="KEY", help="Print one value of the manifest: plan.pack_length.")
    ] = None,
    json: JsonOpt = False,
) -> None:
    """Show a run: the state of its steps, and its lineage over the rounds."""
    from sparkctl.steps.show import get as one
    from sparkctl.steps.show import show as work

    shown = work(run)
    if get is None:
        console.answer(_json(shown), _human(shown), json=json)
        return
    value = one(shown, get)
    if json:
        console.answer({"ok": True, "key": get, "value": value}, "", json=True)
    else:
        typer.echo(value if isinstance(value, str) else console.as_json(value))


def _json(shown: Shown) -> dict[str, Any]:
    steps = {
        step.name: {"status": step.status, "detail": step.detail + step.problem, "hint": step.mend}
        for step in shown.steps
    }
    lineage = [{"id": run.manifest.run.id, "name": run.manifest.run.name} for run in shown.rounds]
    return {"ok": True, **shown.values(), "steps": steps, "lineage": lineage}


def _human(shown: Shown) -> RenderableType:
    manifest = shown.run.manifest
    pairs: list[tuple[str, object]] = [("folder", here(shown.run.root)), ("created", manifest.run.created)]
    if model := manifest.model:
        source = model.source if model.revision else here(shown.run.resolve(model.source))
        pairs.append(("model", f"{source}, {model.parameters:,} parameters"))
    rows = console.rows(manifest.run.name, *pairs)
    return Group(rows, "", _steps(shown.steps), "", _tree(shown), *onward.lines(shown.mends))


def _steps(steps: list[Step]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("step", "state", ""):
        table.add_column(column, overflow="fold")
    for step in steps:
        state = f"[{COLOURS[step.status]}]{step.status}[/]"
        table.add_row(step.name, state, Text(step.detail + step.problem))
    return table


def _tree(shown: Shown) -> Tree:
    """Rounds from the first down to this one, each under the one it came from, with its checkpoints."""
    first = f"{escape(shown.missing_parent)} [dim](not there)[/]" if shown.missing_parent else None
    at = tree = Tree(first or _label(shown.rounds[-1]))
    for number, run in enumerate(reversed(shown.rounds)):
        at = at if number == 0 and first is None else at.add(_label(run))
        _checkpoints(at, run)
    return tree


def _label(run: Run) -> str:
    made, analysis, trained = run.manifest.run, run.manifest.analysis, run.manifest.train
    label = f"[bold]{escape(made.name)}[/] [dim]{made.id}, {made.created[:10]}[/]"
    if analysis:
        label += f" {counted(analysis.examples, 'example')}"
    if trained and trained.best_eval_loss is not None:
        label += f", held-out loss {trained.best_eval_loss:.4f}"
    return label + (" [dim](continues)[/]" if made.continues else "")


def _checkpoints(node: Tree, run: Run) -> None:
    """Each checkpoint under its parent; those from another run's under this round."""
    best = run.manifest.train.best_checkpoint if run.manifest.train else None
    nodes: dict[str, Tree] = {}
    waiting = list(run.manifest.checkpoints)  # as they were written: a merge that was done again comes behind its head
    while waiting:
        ids = {entry.id for entry in waiting}
        for entry in [entry for entry in waiting if entry.parent not in ids] or waiting:
            above = nodes.get(entry.parent or "", node)
            nodes[entry.id] = above.add(_checkpoint(run, entry, entry.id == best))
        waiting = [entry for entry in waiting if entry.id not in nodes]


def _checkpoint(run: Run, entry: Checkpoint, best: bool) -> str:
    loss = f", held-out loss {entry.eval_loss:.4f}" if entry.eval_loss is not None else ""
    mark, path = " [green]best[/]" if best else "", run.resolve(entry.path)
    if not path.exists():
        mark += " [yellow](not there)[/]"
    return f"{escape(entry.id)} [dim]{escape(here(path))}{loss}[/]{mark}"
