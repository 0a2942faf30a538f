"""What a person and a script see: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from sparkctl.errors import SparkError
from sparkctl.progress import Progress, Task

QUIET_SECONDS = 15.0  # between progress lines where stderr is no terminal


def out() -> Console:
    """stdout, as it is now (tests swap it)."""
    return Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """stderr, as it is now."""
    return Console(file=sys.stderr, highlight=False, stderr=True)


def answer(data: dict[str, Any], human: RenderableType, *, json: bool) -> None:
    """The command's answer: one JSON object under --json, else what a person reads."""
    if json:
        sys.stdout.write(jsonlib.dumps(data, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    else:
        out().print(human)


def failure(error: SparkError, *, json: bool) -> None:
    """`error:` and `hint:` on stderr; under --json also one object on stdout."""
    if json:
        report = {"ok": False, "error": error.message, "hint": error.hint, "exit_status": error.exit_status}
        sys.stdout.write(jsonlib.dumps(report, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    console = err()
    console.print(f"[bold red]error:[/] {_plain(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold cyan]hint:[/] {_plain(error.hint)}", soft_wrap=True)


def rows(title: str, *pairs: tuple[str, object]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")  # a path is wrapped, never cut
    for name, value in pairs:
        table.add_row(name, str(value))
    return table


def size(count: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for a person: 2 h 05 min, 3 min 20 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


class _BarTask:
    def __init__(self, progress: RichProgress, id: Any) -> None:
        self._progress, self._id = progress, id

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._id, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._id, note=text)


class _Bars:
    """Live bars on a terminal."""

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        counter = DownloadColumn() if unit == "B" else MofNCompleteColumn()
        columns = ("{task.description}", BarColumn(), counter, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with RichProgress(*columns, console=err(), transient=True) as progress:
            yield _BarTask(progress, progress.add_task(description, total=total, note=""))

    def say(self, text: str) -> None:
        err().print(text, markup=False, soft_wrap=True)


class _LineTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note, self._last = 0.0, "", time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if time.monotonic() - self._last >= QUIET_SECONDS:
            self._last = time.monotonic()
            whole = f" of {self._count(self._total)}" if self._total else ""
            err().print(
                f"{self._description}: {self._count(self._done)}{whole} {self._note}".rstrip(),
                markup=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        self._note = text

    def _count(self, value: float) -> str:
        return size(value) if self._unit == "B" else f"{value:,.0f}"


class _Lines:
    """One line in a while, for logs."""

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield _LineTask(description, total, unit)

    def say(self, text: str) -> None:
        err().print(text, markup=False, soft_wrap=True)


def progress() -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return _Bars() if err().is_terminal else _Lines()
