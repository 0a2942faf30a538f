"""`sparkctl verify`: proofs on this machine, and what a person sees of them."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from sparkctl import env
from sparkctl.cli import console, verdicts
from sparkctl.cli import leaks as leaking
from sparkctl.cli.options import JsonOpt, RunArg, SlowOpt
from sparkctl.errors import SparkError
from sparkctl.manifest.table import EngineName
from sparkctl.words import counted, quoted

HELP = "Prove on this machine: an engine is lossless, documents never meet, trainings resume, a model is complete."
group = typer.Typer(help=HELP)


def register(app: typer.Typer) -> None:
    """Add the command's parts."""
    app.add_typer(group, name="verify")


@group.command()
def lossless(
    run: RunArg,
    engine: Annotated[EngineName | None, typer.Option("--engine", help="This one instead of the run's.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps side by side.")] = 30,
    allow_slow: SlowOpt = False,
    json: JsonOpt = False,
) -> None:
    """Gradients and a short training of the run's engine beside the reference, against fp32: the certificate."""
    from sparkctl.steps.verify_lossless import verify_lossless

    made = verify_lossless(run, engine=engine, steps=steps, allow_slow=allow_slow, progress=console.progress())
    rows = [{**asdict(row), "ratio": row.ratio} for row in made.certificate.tensors]
    course = [dict(zip(verdicts.WHO, map(asdict, step), strict=True)) for step in made.certificate.steps]
    answer = {"run": str(made.run), "lossless": made.table.model_dump(mode="json"), "tensors": rows, "course": course}
    if env.rank() == 0:
        _answer(answer, verdicts.certificate(made), made.table.problems, made.hint, json)


@group.command()
def leaks(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Its architecture; else Qwen3.5's.")] = None,
    engine: Annotated[EngineName | None, typer.Option("--engine", help="This one alone; else all.")] = None,
    allow_slow: SlowOpt = False,
    json: JsonOpt = False,
) -> None:
    """Change one document of a pack: nothing of the others may change. Operators, engines, installed transformers."""
    from sparkctl.steps.verify_leaks import verify_leaks

    looked = verify_leaks(run, engine=engine, allow_slow=allow_slow, progress=console.progress())
    found = looked.findings
    problems = [f"{f.subject}, {f.part}: " + ("leaks" if f.leaks else "blind to a leak") for f in found if f.failed]
    rows = [{**asdict(f), "leaks": f.leaks, "failed": f.failed} for f in found]
    answer = {"findings": rows, "transformers_leaks": bool(leaking.leaking_calls(found)[0])}
    _answer(answer, leaking.as_text(found), problems, looked.hint, json)


@group.command()
def resume(run: RunArg, allow_slow: SlowOpt = False, json: JsonOpt = False) -> None:
    """Train a few steps of the run's plan straight, and again killed and resumed: the same bytes."""
    from sparkctl.steps.verify_resume import verify_resume

    made = verify_resume(run, allow_slow=allow_slow, progress=console.progress())
    how = f"killed at step {made.killed_at}, resumed from step {made.resumed_from}"
    bytes = counted(len(made.differences), "difference") if made.differences else "equal: metrics, weights, moments"
    human = console.rows("resume", ("trained", f"{made.steps} steps straight, and again {how}"), ("bytes", bytes))
    hint = f"`sparkctl verify resume {quoted(run)}`, once more; what differs again is a bug of this program"
    _answer({**asdict(made), "run": str(made.run)}, human, made.differences, hint, json)


@group.command()
def model(folder: Annotated[Path, typer.Argument(help="A checkpoint's folder.")], json: JsonOpt = False) -> None:
    """Whether a checkpoint holds every tensor that its config.json promises, and nothing besides."""
    from sparkctl.model.anew import folder_anew
    from sparkctl.steps.verify_model import verify_model

    problems = verify_model(folder)
    human = console.rows("model", ("folder", folder), ("problems", len(problems) or "none"))
    _answer({"folder": str(folder)}, human, problems, folder_anew(folder), json)


def _answer(answer: dict[str, Any], human: RenderableType, problems: list[str], hint: str, json: bool) -> None:
    """Print what was found; exit status 1 where a check found something, each on a line of its own."""
    answer = _finite({"ok": not problems, **answer, "problems": problems, "hint": hint if problems else None})
    console.answer(answer, human, json=json)
    if problems:
        console.failure(SparkError("\n".join(problems), hint), json=False)
        raise typer.Exit(1)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for what is no number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
