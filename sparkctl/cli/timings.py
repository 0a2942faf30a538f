"""What `sparkctl bench` shows: a table for a person, one object for a script."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sparkctl.cli import console
from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.bench.predict import Prediction
    from sparkctl.bench.setting import Setting
    from sparkctl.bench.step import Row


COLUMNS = ("tok/s", "p20 to p80", "ratio", "busy ms", "of wall", "GEMM share", "peak", "launches", "start")


def step_json(at: Setting, rows: list[Row]) -> dict[str, Any]:
    from sparkctl.hardware.software import versions

    table = [
        {**asdict(row), "tokens_per_second": row.rate(), "share": row.share, "ratio": _ratio(row, rows[0])}
        for row in rows
    ]
    setting = {"machine": at.machine.model_dump(), "shape": at.name, "note": at.note, "parameters": at.parameters}
    trained = (
        {"draft_steps": at.work.draft_steps} if at.work.draft_steps else {"mode": at.work.mode, "rank": at.work.rank}
    )
    work = {"lengths": at.work.lengths, "labels": sum(at.work.labels), **trained}
    return {"ok": not all(row.failed for row in rows), **setting, **work, "versions": versions(), "stacks": table}


def step_table(at: Setting, rows: list[Row]) -> Group:
    head = f"MTP head over {counted(at.work.draft_steps, 'draft step')}"
    title = (
        f"{at.name}, {head if at.work.draft_steps else at.work.mode}, one pack of {at.work.tokens:,} tokens in "
        f"{counted(len(at.work.lengths), 'document')} "
        f"on {at.machine.name}"
    )
    table = Table(box=None, pad_edge=False)
    cells = [["failed"] if row.failed else _cells(row, rows[0]) for row in rows]
    filled = [i for i in range(len(COLUMNS)) if any(len(line) > i and line[i] for line in cells)]  # a CPU fills fewer
    for column in ("stack", *(COLUMNS[i] for i in filled)):
        table.add_column(column, justify="left" if column == "stack" else "right")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(row.stack, *(line[i] for i in filled if i < len(line)))
    notes = [row.failed for row in rows if row.failed] + ([at.note] if at.note else [])
    return Group(console.titled(title, table), *map(escape, notes))


def _cells(row: Row, first: Row) -> list[str]:
    m, ratio = row.measured, _ratio(row, first)
    assert m
    assert m.p50
    starts = [f"{seconds:.0f} s" for seconds in (row.cold, m.first_step) if seconds is not None]
    return [
        f"{row.rate():,.0f}",
        f"{row.rate(20):,.0f} to {row.rate(80):,.0f}",
        f"{ratio:.2f}" if ratio else "",
        f"{1e3 * m.busy:.1f}" if m.busy else "",
        f"{m.busy / m.p50:.0%}" if m.busy else "",
        f"{row.share:.0%}" if row.share else "",
        console.size(m.peak_memory) if m.peak_memory else "",
        f"{m.launches:,.0f}" if m.launches else "",
        " / ".join(starts),
    ]


def _ratio(row: Row, first: Row) -> float | None:
    mine, theirs = row.rate(), first.rate()
    return mine / theirs if mine and theirs else None


def predict_json(found: Prediction) -> dict[str, Any]:
    """A prediction as one object."""
    parts = [
        {"name": p.name, "operations": p.operations, "bytes": p.bytes, "seconds": p.seconds(found.ceiling)}
        for p in found.parts
    ]
    return {
        "ok": True, "prediction": True, "device": found.ceiling.name, "shape": found.shape, "mode": found.work.mode,
        "seconds": found.seconds, "tokens_per_second": found.tokens_per_second, "parts": parts,
    }  # fmt: skip


def predict_table(found: Prediction) -> Group:
    """A prediction for a person."""
    title = f"prediction, not a measurement: {found.shape}, {found.work.mode}, {found.work.tokens:,} tokens"
    table = Table(box=None, pad_edge=False)
    for column in ("part", "TFLOP", "GB", "ms", "bound by"):
        table.add_column(column, justify="left" if column in ("part", "bound by") else "right")
    for p in found.parts:
        limit = "memory" if p.bytes / found.ceiling.bytes >= p.seconds(found.ceiling) else "operations"
        ms = f"{1e3 * p.seconds(found.ceiling):.1f}"
        table.add_row(p.name, f"{p.operations / 1e12:.2f}", f"{p.bytes / 1e9:.1f}", ms, limit)
    ceiling = f"{found.ceiling.bytes / 1e9:,.0f} GB/s, {found.ceiling.operations / 1e12:,.0f} TFLOP/s"
    titled = console.titled(f"{title} on {found.ceiling.name}", table)
    return Group(titled, f"at best {found.tokens_per_second:,.0f} tok/s, at {ceiling}; real steps take longer")
