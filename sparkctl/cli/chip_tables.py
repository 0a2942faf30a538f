"""The features of a chip for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparkctl.cli import console
from sparkctl.doctor.chip import yes

if TYPE_CHECKING:
    from sparkctl.doctor.chip import Row

STYLES = {True: "green", False: "", None: "dim"}


def features(rows: list[Row], target: str) -> RenderableType:
    """Each feature of the target: what it should have, what was found, and how that is known."""
    table = plain("feature", "expected", "found", "proof", "what this project does with it")
    for row in rows:
        found = Text(yes(row.found), style="bold yellow" if row.differs else STYLES[row.found])
        table.add_row(row.name, yes(row.expected), found, row.proof or "–", row.use)
    shown = console.titled(f"features of {target}", table)
    open_ones = any(row.launch_only and row.found is None for row in rows)
    legend = Text("?  ptxas takes it for every target: only a launch on that GPU tells", style="dim")
    return Group(shown, legend) if open_ones else shown


def assembled(rows: list[Row]) -> RenderableType:
    """The same probes for several targets; what all of them take proves nothing."""
    targets = list(rows[0].assembled)
    table = plain("assembled for", *targets)
    for row in rows:
        if row.launch_only:
            shown = (Text(yes(value), style="dim") for value in row.assembled.values())
            table.add_row(row.name, *shown, "only a launch tells")
        else:
            table.add_row(row.name, *(Text(yes(value), style=STYLES[value]) for value in row.assembled.values()))
    return table


def plain(*left: str) -> Table:
    """A table without lines."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    for column in left:
        table.add_column(column, overflow="fold")
    return table
