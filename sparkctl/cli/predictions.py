"""What `sparkctl bench predict` shows: a table for a person, one object for a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from sparkctl.cli import console

if TYPE_CHECKING:
    from sparkctl.bench.predict import Prediction


def as_json(found: Prediction) -> dict[str, Any]:
    """A prediction as one object."""
    parts = [
        {"name": p.name, "operations": p.operations, "bytes": p.bytes, "seconds": p.seconds(found.ceiling)}
        for p in found.parts
    ]
    return {
        "ok": True, "prediction": True, "device": found.ceiling.name, "shape": found.shape, "mode": found.work.mode,
        "seconds": found.seconds, "tokens_per_second": found.tokens_per_second, "peak_memory": found.peak_memory,
        "memory": found.ceiling.memory, "fits": found.fits, "parts": parts,
    }  # fmt: skip


def as_table(found: Prediction) -> Group:
    """A prediction for a person."""
    title = f"prediction, not a measurement: {found.shape}, {found.work.mode}, {found.work.tokens:,} tokens"
    table = Table(box=None, pad_edge=False)
    for column in ("part", "TFLOP", "GB", "ms", "bound by"):
        table.add_column(column, justify="left" if column in ("part", "bound by") else "right")
    for p in found.parts:
        limit = "memory" if p.bytes / found.ceiling.bytes >= p.seconds(found.ceiling) else "operations"
        ms = f"{1e3 * p.seconds(found.ceiling):,.1f}"
        table.add_row(p.name, f"{p.operations / 1e12:.2f}", f"{p.bytes / 1e9:.1f}", ms, limit)
    ceiling = f"{found.ceiling.bytes / 1e9:,.0f} GB/s, {found.ceiling.operations / 1e12:,.0f} TFLOP/s"
    titled = console.titled(f"{title} on {found.ceiling.name}", table)
    rate = f"at best {found.tokens_per_second:,.0f} tok/s, at {ceiling}; real steps take longer"
    needed, there = (f"{memory / 2**30:,.1f} GiB" for memory in (found.peak_memory, found.ceiling.memory))
    room = (
        f"a training takes {needed} of {there}"
        if found.fits
        else f"a training does not fit: it takes {needed} of {there}"
    )
    return Group(titled, rate, room)
