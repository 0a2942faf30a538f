"""What `sparkctl bench` shows: a table for a person, one object for a script."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Group
from rich.markup import escape

from sparkctl.cli import arriving, console
from sparkctl.progress import Progress
from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.bench.setting import Setting
    from sparkctl.bench.step import Row
    from sparkctl.bench.worker import Measured


COLUMNS = ("tok/s", "p20 to p80", "ratio", "busy ms", "of wall", "GEMM share", "peak", "launches", "start")


def answer(
    at: Setting, rows: Iterable[Row], as_json: Callable[[Setting, list[Row]], dict[str, Any]] | None = None,
    table: Callable[[Setting, list[Row]], Group] | None = None, *, json: bool, progress: Progress,
) -> None:  # fmt: skip
    """Say each stack's result when it is there, then all; status 1 where every stack failed."""
    one, all_of_it = partial(as_json or step_json, at), partial(table or step_table, at)
    done = arriving.answer(rows, step_line, one, all_of_it, json=json, progress=progress)
    if all(row.failed for row in done):
        raise typer.Exit(1)


def step_line(row: Row) -> str:
    """native: 58,578 tok/s, 91.8 ms, 12.5 GiB."""
    m = row.measured
    if not m or not m.p50:
        return row.failed or row.stack
    return f"{row.stack}: {row.rate():,.0f} tok/s, {1e3 * m.p50:.1f} ms" + (f", {_gib(m)}" if m.peak_memory else "")


def _gib(m: Measured) -> str:
    return f"{m.peak_memory / 2**30:.1f} GiB" if m.peak_memory else ""


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
    lines = [[row.stack, *(["failed"] if row.failed else _cells(row, rows[0]))] for row in rows]
    table = console.figures(("stack", *COLUMNS), lines)
    notes = [row.failed for row in rows if row.failed] + ([at.note] if at.note else [])
    if any(row.kept for row in rows):
        notes.append(f"plans of {at.name} on this machine expect native's rate from now on")
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
        _gib(m),
        f"{m.launches:,.0f}" if m.launches else "",
        " / ".join(starts),
    ]


def _ratio(row: Row, first: Row) -> float | None:
    mine, theirs = row.rate(), first.rate()
    return mine / theirs if mine and theirs else None
