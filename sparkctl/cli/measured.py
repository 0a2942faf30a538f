"""What `bench kernels`, `products` and `synthetic` show: a table for a person, one object for a script."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape

from sparkctl.cli import console, timings
from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.bench.kernels import Row as KernelRow
    from sparkctl.bench.kernels import Timing
    from sparkctl.bench.products import Row as ProductRow
    from sparkctl.bench.setting import Setting
    from sparkctl.bench.step import Row


def kernels_json(at: Setting, rows: list[KernelRow]) -> dict[str, Any]:
    """Operators as one object."""
    table = [{**asdict(row), "right": row.right, "share": row.share} for row in rows]
    return {"ok": not any(row.right is False for row in rows), **_setting(at), "operators": table}


def kernel_line(row: KernelRow) -> str:
    """rms_norm: 0.041 ms, 83% of the ceiling."""
    if not row.ours:
        return f"{row.operator}: {row.failed or f'wrong, {max(row.errors.values()):.2f} times what is allowed'}"
    share = f", {row.share:.0%} of the ceiling" if row.share else ""
    return f"{row.operator}: {1e3 * row.ours.p50:.3f} ms{share}"


def kernels_table(at: Setting, rows: list[KernelRow]) -> Group:
    """Operators for a person."""
    columns = ("operator", "kernel", "error", "ms", "p20 to p80", "busy ms", "of ceiling", "torch ms", "a library's ms")
    table = console.figures(columns, [_figures(row) for row in rows], left=2)
    title = f"{at.name}, {at.work.tokens:,} tokens in {counted(len(at.work.lengths), 'document')}, on {at.machine.name}"
    notes = [
        "error: the worst result's distance from fp32 over what is allowed, twice plain torch's in bf16; 1 at most",
        "of ceiling: the time that bytes or operations take at this machine's measured rates; * bytes",
        *(f"{row.operator}: {row.failed}" for row in rows if row.failed),
        *(f"{row.operator}: {row.unchecked}" for row in rows if row.unchecked), *([at.note] if at.note else []),
    ]  # fmt: skip
    return Group(console.titled(title, table), *map(escape, notes))


def _figures(row: KernelRow) -> list[str]:
    named = [row.operator, row.kernel, f"{max(row.errors.values()):.2f}" if row.errors else ""]
    if not row.ours:
        return [*named, "failed" if row.failed else "wrong"]
    assert row.eager
    share = f"{row.share:.0%}{'*' if row.memory_bound else ''}" if row.share else ""
    busy = f"{1e3 * row.ours.busy:.3f}" if row.ours.busy else ""
    library = f"{_shown(row.library[1])} ({row.library[0]})" if row.library else ""
    spread = f"{1e3 * row.ours.p20:.3f} to {1e3 * row.ours.p80:.3f}"
    return [*named, f"{1e3 * row.ours.p50:.3f}", spread, busy, share, _shown(row.eager), library]


def _shown(timing: Timing) -> str:
    """Median, and GPU-busy behind it."""
    return f"{1e3 * timing.p50:.3f}" + (f" / {1e3 * timing.busy:.3f}" if timing.busy else "")


def products_json(at: Setting, rows: list[ProductRow], kept: bool) -> dict[str, Any]:
    """Products as one object."""
    table = [{**asdict(row), "best": row.timed.best, "speedup": row.speedup} for row in rows]
    return {"ok": True, **_setting(at), "mode": at.work.trained, "rank": at.work.rank, "kept": kept, "products": table}


def products_table(at: Setting, rows: list[ProductRow], kept: bool) -> Group:
    """Products for a person."""
    if not rows:
        return Group("torch computes every product on a CPU: there is nothing to choose from")
    ways = list(rows[0].timed.seconds | rows[0].timed.wrong)
    lines = []
    for row in rows:
        seconds = row.timed.seconds
        cells = [f"{1e6 * seconds[way]:.1f}" if way in seconds else "wrong" for way in ways]
        lines.append([row.name, *cells, row.timed.best, f"{row.operations / seconds[row.timed.best] / 1e12:.0f}"])
    table = console.figures(("product", *(f"{way} µs" for way in ways), "best", "TFLOP/s"), lines)
    title = f"products of {at.name}, {at.work.trained}, {at.work.tokens:,} tokens, on {at.machine.name}"
    end = "trainings that start on this machine take the best of each" if kept else "nothing was kept"
    return Group(console.titled(title, table), end)


def synthetic_json(at: Setting, rows: list[Row]) -> dict[str, Any]:
    """The dense model's stacks as one object."""
    from sparkctl.bench.synthetic import PUBLISHED

    return {**timings.step_json(at, rows), "published": PUBLISHED[at.work.mode]}


def synthetic_table(at: Setting, rows: list[Row]) -> Group:
    """The dense model's stacks for a person."""
    from sparkctl.bench.synthetic import PUBLISHED

    figure = PUBLISHED[at.work.mode]
    return Group(timings.step_table(at, rows), f"the published recipe: {figure:.2f} times its stock, on a GB10")


def _setting(at: Setting) -> dict[str, Any]:
    from sparkctl.hardware.software import versions

    setting = {"machine": at.machine.model_dump(), "shape": at.name, "note": at.note}
    return {**setting, "lengths": at.work.lengths, "labels": sum(at.work.labels), "versions": versions()}
