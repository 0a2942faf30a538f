"""`sparkctl analyze`: its options, and what a person sees of an analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from sparkctl.cli import console
from sparkctl.cli.options import DryRunOpt, ForceOpt, JsonOpt, about
from sparkctl.manifest.schema import AnalysisTable, DataTable, Dropped, ModelTable, RunTable
from sparkctl.words import counted, heading

if TYPE_CHECKING:
    from sparkctl.steps.analyze import Result, Shown

BAR = 40  # characters of the longest histogram bar


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
    for message in result.bad:
        progress.say(f"skipped: {message}")
    console.answer(_json(result, dry_run), _human(result, dry_run), json=json)


def _json(result: Result, dry_run: bool) -> dict[str, Any]:
    plain = {name: getattr(result, name).model_dump(mode="json") for name in ("model", "data", "analysis")}
    shown = [{"place": s.place, "tokens": s.tokens, "pieces": s.pieces} for s in result.shown]
    status = {"ok": True, "run": str(result.run), "up_to_date": result.up_to_date, "dry_run": dry_run}
    return {**status, **plain, "bad_lines": result.bad, "shown": shown}


def _human(result: Result, dry_run: bool) -> RenderableType:
    a, model = result.analysis, result.model
    title = f"analysis of {result.run.absolute().name}"
    title = heading(title, dry_run=dry_run, up_to_date=result.up_to_date, made=result.made)
    pairs: list[tuple[str, object]] = [
        ("model", f"{model.model_type}, {model.parameters:,} parameters"),
        ("examples", f"{a.examples:,}: {a.train_examples:,} to train on, {a.eval_examples:,} held out"),
        ("tokens", f"{a.tokens:,}, of which {a.assistant_tokens:,} trained ({a.assistant_tokens / a.tokens:.0%})"),
        ("length", f"mean {a.mean:,.0f} (rounded up to 128: {a.mean_length_128:,}), max {a.max:,}"),
        ("percentiles", f"p50 {a.p50:,}  p90 {a.p90:,}  p95 {a.p95:,}  p99 {a.p99:,}"),
        ("turns", f"{a.turns:.2f} of the model an example"),
        ("duplicates", f"{a.duplicates:,}"),
        ("dropped", _dropped(result.data.dropped)),
        ("markers", _markers(a)),
        ("reused", f"{a.reused:,} tokenised before"),
        ("time", console.duration(a.seconds)),
    ]
    return Group(*map(_seen, result.shown), console.rows(title, *pairs), _histogram(a))


def _dropped(dropped: Dropped) -> str:
    counts = dropped.model_dump()
    bad = counts.pop("bad_lines")
    told = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return ", ".join(told + [counted(bad, "bad line")] * bool(bad)) or "none"


def _markers(analysis: AnalysisTable) -> str:
    if not analysis.marker_examples:
        return "no example holds the template's markers"
    places = ", ".join(analysis.marker_places)
    trained = "what others say is not trained, an answer up to its first end token"
    return f"{counted(analysis.marker_examples, 'example')} with the template's markers in a text ({trained}): {places}"


def _histogram(analysis: AnalysisTable) -> Text:
    counts, edges = analysis.histogram.counts, analysis.histogram.edges
    width, scale = len(f"{edges[-1]:,}"), BAR / max(counts)
    lines = [
        f"{low:>{width},} to {high - 1:<{width},} " + f"{'█' * max(round(count * scale), count > 0)} {count:,}".lstrip()
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return Text("\ntokens an example\n" + "\n".join(lines))


def _seen(shown: Shown) -> Text:
    """The example's text; what is trained is green, and between ⟦ ⟧ for those who see no colour."""
    text = Text(f"{shown.place}, {shown.tokens} tokens, trained between ⟦ ⟧\n", style="dim")
    for piece, trained in shown.pieces:
        text.append(f"⟦{piece}⟧" if trained else piece, style="not dim bold green" if trained else "not dim")
    return text.append("\n")
