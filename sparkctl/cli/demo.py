"""`sparkctl demo`: the main job on the embedded default, as a check that can fail."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparkctl.cli import acceptance, console
from sparkctl.cli.options import JsonOpt
from sparkctl.errors import SparkError
from sparkctl.words import quoted

if TYPE_CHECKING:
    from sparkctl.steps.demo import Demo

SHOWN = 8  # questions in the table, spread over all of them

TINY = (
    "What is tiny here: the model ({parameters:.1f} M parameters, {layers} layers, its own tokenizer of {vocabulary} "
    "tokens and a few hundred facts that it was trained on beforehand), the data ({examples} one-line chats) and the "
    "machine (any CPU). The vision tower and the MTP head are real in form; the tower has seen no image. The steps, "
    "the files and the arithmetic are those of a real run."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where the demo works; an earlier demo in it is replaced.")
    ] = Path("demo"),
    json: JsonOpt = False,
) -> None:
    """Play the whole job on a tiny model: analyze, recommend, train, kill, resume, merge, the MTP head, ask.

    A minute or two on a CPU.
    """
    from sparkctl.steps.demo import demo as play

    result = play(folder, progress=console.progress())
    console.answer(as_json(result), as_text(result), json=json)
    for problem in result.problems:
        again = f"`sparkctl demo {quoted(folder)}`, once more; what is said again then is a bug of this program"
        console.failure(SparkError(problem, again), json=False)
    if result.problems:
        raise typer.Exit(1)


def as_json(result: Demo) -> dict[str, Any]:
    """The figures, for scripts."""
    return {
        "ok": not result.problems,
        "problems": result.problems,
        "folder": str(result.folder),
        "parameters": result.parameters,
        "examples": result.examples,
        "steps": result.steps,
        "killed_at": result.killed_at,
        "resumed_from": result.resumed_from,
        "final_loss": result.final_loss,
        "questions": len(result.answers),
        "exact_before": result.before,
        "exact_after": result.after,
        "drafts": [acceptance.row_json(row) for row in result.drafts],
        "serve": result.serve,
        "seconds": result.seconds,
        "answers": [vars(answer) for answer in result.answers],
    }


def as_text(result: Demo) -> Group:
    """A few answers, the figures, and what is tiny."""
    from sparkctl.demo.model import TEXT
    from sparkctl.demo.tokenizer import VOCABULARY

    asked = len(result.answers)
    table = Table()
    for column in ("question", "before", "after"):
        table.add_column(column, overflow="fold")
    for answer in result.answers[:: max(1, asked // SHOWN)]:
        table.add_row(*map(Text, (answer.question, answer.before, answer.after)))
    seconds = " · ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    figures = console.rows(
        "Figures",
        ("exact answers before", f"{result.before} of {asked} ({100 * result.before / asked:.0f} %)"),
        ("exact answers after", f"{result.after} of {asked} ({100 * result.after / asked:.0f} %)"),
        ("final loss", f"{result.final_loss:.4f}"),
        ("training", f"killed at step {result.killed_at}, resumed from {result.resumed_from}, {result.steps} steps"),
        ("seconds", f"{seconds} · together {sum(result.seconds.values()):.0f}"),
        ("run", f"{result.folder / 'run'} (sparkctl show {quoted(result.folder / 'run')})"),
    )
    tiny = TINY.format(
        parameters=result.parameters / 1e6,
        layers=TEXT["num_hidden_layers"],
        vocabulary=VOCABULARY,
        examples=result.examples,
    )
    drafts = console.titled("Accepted drafts of the MTP head", acceptance.table(result.drafts))
    return Group(console.titled("Held-out questions", table), "", drafts, "", figures, "", tiny)
