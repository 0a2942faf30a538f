"""What `sparkctl bench` shows: a table for a person, one object for a script."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from sparkctl.cli import console

if TYPE_CHECKING:
    from sparkctl.bench.setting import Setting
    from sparkctl.bench.step import Row


def step_json(at: Setting, rows: list[Row]) -> dict[str, Any]:
    from sparkctl.hardware.software import versions

    table = [
        {**asdict(row), "tokens_per_second": row.rate(), "share": row.share, "ratio": _ratio(row, rows[0])}
        for row in rows
    ]
    setting = {"machine": at.machine.model_dump(), "shape": at.name, "note": at.note, "parameters": at.parameters}
    work = {"mode": at.work.mode, "lengths": at.work.lengths, "labels": sum(at.work.labels), "rank": at.work.rank}
    return {"ok": not all(row.failed for row in rows), **setting, **work, "versions": versions(), "stacks": table}


def step_table(at: Setting, rows: list[Row]) -> Group:
    title = (
        f"{at.name}, {at.work.mode}, one pack of {at.work.tokens:,} tokens in {len(at.work.lengths)} documents "
        f"on {at.machine.name}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in (
        "stack",
        "tok/s",
        "p20 to p80",
        "ratio",
        "busy ms",
        "of wall",
        "GEMM share",
        "peak",
        "launches",
        "start",
    ):
        table.add_column(column, justify="left" if column == "stack" else "right")
    for row in rows:
        table.add_row(row.stack, *(["failed"] if row.failed else _cells(row, rows[0])))
    notes = [f"{row.stack}: {row.failed}" for row in rows if row.failed]
    return Group(table, *notes, *([at.note] if at.note else []))


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
