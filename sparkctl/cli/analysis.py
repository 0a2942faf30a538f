"""What a person and a script see of `sparkctl analyze`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from sparkctl.cli import console
from sparkctl.manifest.schema import AnalysisTable, Dropped
from sparkctl.words import counted, heading

if TYPE_CHECKING:
    from sparkctl.steps.analyze import Result, Shown

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}  # ␛ for ESC
BAR = 40  # characters of the longest histogram bar


def as_json(result: Result, dry_run: bool) -> dict[str, Any]:
    """The answer under --json."""
    plain = {name: getattr(result, name).model_dump(mode="json") for name in ("model", "data", "analysis")}
    shown = [{"place": s.place, "tokens": s.tokens, "pieces": s.pieces} for s in result.shown]
    status = {"ok": True, "run": str(result.run), "up_to_date": result.up_to_date, "dry_run": dry_run}
    return {**status, **plain, "bad_lines": result.data.bad, "shown": shown, "notes": result.notes}


def as_text(result: Result, dry_run: bool) -> RenderableType:
    """The examples that were asked for, the figures, the lengths, and what is to be noted."""
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
        ("duplicates", _duplicates(a.duplicates)),
        ("dropped", _dropped(result.data.dropped)),
        ("markers", _markers(a)),
        ("reused", f"{a.reused:,} tokenised before"),
        ("time", console.duration(a.seconds)),
    ]
    notes = [Text(f"\nnote: {note}") for note in result.notes]
    return Group(*map(_seen, result.shown), console.rows(title, *pairs), _histogram(a), *notes)


def _duplicates(count: int) -> str:
    kept = "each is kept, so an example counts as often as it stands there"
    return f"{counted(count, 'example')} equal to an earlier one; {kept}" if count else "none"


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
    """The example's text; what is trained is green, and between ⟦ ⟧ for those who see no colour. Control characters are
    seen by their pictures: a terminal would obey them.
    """
    text = Text(f"{shown.place}, {shown.tokens} tokens, trained between ⟦ ⟧\n", style="dim")
    for raw, trained in shown.pieces:
        piece = raw.translate(PICTURES)
        text.append(f"⟦{piece}⟧" if trained else piece, style="not dim bold green" if trained else "not dim")
    return text.append("\n")
