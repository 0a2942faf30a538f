"""The kernels that `sparkctl doctor --kernels` compiled, for a person."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.doctor.kernels import Compiled, Kernel

SHOWN = ("mma.sync", "wgmma", "tcgen05.mma", "cp.async", "cp.async.bulk", "fma")  # fma is the slow way of a product
NUMBERS = ("warps", "regs", "stack", "shared")


def kernels(made: Compiled) -> RenderableType:
    """A line a configuration, and the verdict. Those that differ in nothing that is shown have one line."""
    kinds = [kind for kind in SHOWN if any(kind in one.instructions for one in made.kernels)]
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("kernel, configuration", overflow="fold")
    for column in (*kinds, *NUMBERS):
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in groupby(sorted(made.kernels, key=lambda one: one.kernel), key=lambda one: one.kernel):
        table.add_row(Text(name, style="bold"))
        for first, *numbers in dict.fromkeys(_cells(one, kinds) for one in group):
            table.add_row(Padding(Text(first), (0, 0, 0, 2)), *numbers)
    return Group(table, Text(), _verdict(made))


def _cells(one: Kernel, kinds: list[str]) -> tuple[str, ...]:
    counts = (str(one.instructions.get(kind, "")) for kind in kinds)
    return f"{one.shape} {one.settings}", *counts, str(one.warps), str(one.registers), str(one.stack), f"{one.shared:,}"


def _verdict(made: Compiled) -> Text:
    most = max((one.shared for one in made.kernels), default=0)
    names = {one.kernel for one in made.kernels}
    return Text(
        f"{made.target}: {counted(len(names), 'kernel')}, {counted(len(made.kernels), 'configuration')}, at most "
        f"{most:,} of {made.shared:,} bytes of shared memory, {counted(len(made.faults), 'fault')}",
        style="bold red" if made.faults else "bold green",
    )
