"""What a person and a script see: the answer on stdout, everything else on stderr.

Of the processes that torchrun started, the first alone answers and tells of its progress; each says what ended it.
"""

from __future__ import annotations

import codecs
import json as jsonlib
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from sparkctl import env
from sparkctl.errors import Interrupted, SparkError
from sparkctl.progress import Progress, Task, silent
from sparkctl.words import size

QUIET_SECONDS = 15.0  # between progress lines where stderr is no terminal
COMMAND = re.compile(r"`[^`\n]+`|^sparkctl .*$", re.MULTILINE)
GLUE = "\0"  # stands for a space that is no place to break a line
WIDE = 10_000  # columns where there is no terminal: nothing is wrapped in a pipe or a log


def out() -> Console:
    """stdout, as it is now (tests swap it)."""
    return _console(sys.stdout)


def err() -> Console:
    """stderr, as it is now."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, emoji=False, width=None if stream.isatty() else WIDE)


def forgiving() -> None:
    """Let no stream end the work: one that is closed leads nowhere, stdout and stderr print `?` for what their encoding
    lacks, and what stderr no longer takes is dropped (its reader may have gone, or its disk be full)."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file that is opened would be taken for the stream
            handle = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(handle, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stderr = cast("TextIO", _Heedless(sys.stderr))


class _Heedless:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def answer(data: dict[str, Any], human: RenderableType, *, json: bool) -> None:
    """The command's answer: one JSON object under --json, else what a person reads."""
    if json:
        _json(data)
    else:
        _show(out(), human)


def as_json(value: Any) -> str:
    """JSON in the characters that stdout can take."""
    utf8 = sys.stdout.encoding and codecs.lookup(sys.stdout.encoding).name == "utf-8"
    return jsonlib.dumps(value, ensure_ascii=not utf8)


def _json(data: dict[str, Any]) -> None:
    sys.stdout.write(as_json(data) + "\n")
    sys.stdout.flush()


def _show(console: Console, item: RenderableType) -> None:
    """Print; a Text as it is, never wrapped; a table never cut, and without blanks at its lines' ends in a file."""
    if isinstance(item, Group):
        for part in item.renderables:
            _show(console, part)
    elif isinstance(item, Text):
        console.print(item, soft_wrap=True)
    elif console.width < WIDE:
        least = Measurement.get(console, console.options.update(max_width=WIDE), item).minimum
        console.print(item, width=max(console.width, least), crop=False)
    else:
        with console.capture() as caught:
            console.print(item)
        console.file.write("".join(f"{line.rstrip()}\n" for line in caught.get().splitlines()))
        console.file.flush()


def failure(error: SparkError, *, json: bool) -> None:
    """`error:` and `hint:` on stderr; under --json also one object on stdout, what was found before it included."""
    if json and env.rank() == 0:
        found = error.answer if isinstance(error, Interrupted) else {}
        with suppress(OSError):  # stdout itself may be what fails
            _json({**found, "ok": False, "error": error.message, "hint": error.hint, "exit_status": error.exit_status})
    _line(err(), error.message, "error:", "bold red")
    if error.hint:
        _line(err(), error.hint, "hint:", "bold cyan")


def remark(text: str, hint: str | None, label: str, style: str) -> None:
    """Something that was found, on stderr under a label of its own, and its hint where it has one."""
    _line(err(), text, label, style)
    if hint:
        _line(err(), hint, "hint:", "bold cyan")


def _line(console: Console, text: str, label: str = "", style: str = "") -> None:
    """A message, on a terminal broken between words, never in one, nor in a command: that one can be copied."""
    text = COMMAND.sub(lambda found: found[0].replace(" ", GLUE), text)
    text = f"{label} {text}" if label else text
    if console.width < WIDE:
        text = "\n".join(_broken(line, console.width) for line in text.split("\n"))
    text = text.replace(GLUE, " ")
    message = Text(text)
    message.stylize(style, 0, len(label))
    console.print(message, soft_wrap=True)


def _broken(line: str, width: int) -> str:
    return "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))


def titled(title: str, table: Table) -> Group:
    """A table under its title, which has a line of its own: a narrow table does not fold it."""
    return Group(Text(title, style="bold"), table)


def rows(title: str, *pairs: tuple[str, object]) -> Group:
    """A two-column table of names and values, the values as they are: a `[` in them is no markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")  # a path is wrapped, never cut
    for name, value in pairs:
        table.add_row(Text(name), Text(str(value)))
    return titled(title, table)


def figures(columns: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are names and whose others are figures.

    A column that no line fills is left out; a line may end early. On a narrow terminal cells fold between words.
    """
    table, narrow = Table(box=None, pad_edge=False), out().width < WIDE
    filled = [i for i in range(len(columns)) if any(len(line) > i and line[i] for line in lines)]
    for i in filled:
        name, cells = columns[i], [line[i] for line in lines if len(line) > i]
        longest = max(len(word) for word in " ".join([name, *cells]).split())
        single = all(" " not in cell for cell in cells)  # then no line of it folds but its name
        if narrow and single and len(name) > longest:
            name = name.replace(" ", "\n")
        table.add_column(name, justify="left" if i < left else "right", min_width=longest, no_wrap=single)
    for line in lines:
        table.add_row(*(Text(line[i]) for i in filled if i < len(line)))
    return table


def duration(seconds: float) -> str:
    """Seconds for a person: 2 h 05 min, 3 min 20 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class _BarTask:
    def __init__(self, progress: RichProgress, id: TaskID) -> None:
        self._progress, self._id = progress, id

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._id, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._id, note=text)


class _Counter(ProgressColumn):
    """Bytes as MB, everything else as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._things = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: RichTask) -> Text:
        return (self._bytes if task.fields["unit"] == "B" else self._things).render(task)


class _Remaining(TimeRemainingColumn):
    """The time left, where no note says it."""

    def render(self, task: RichTask) -> Text:
        return Text() if task.fields["note"] else super().render(task)


class _Bars:
    """Live bars on a terminal: one display, above which messages are printed while it lives."""

    def __init__(self) -> None:
        self._live: RichProgress | None = None

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        with self._display() as live:
            id = live.add_task(description, total=total, note="", unit=unit)
            try:
                yield _BarTask(live, id)
            finally:
                live.remove_task(id)

    @contextmanager
    def _display(self) -> Iterator[RichProgress]:
        if self._live:
            yield self._live
            return
        note = TextColumn("{task.fields[note]}", markup=False)
        columns = ("{task.description}", BarColumn(bar_width=20), _Counter(), _Remaining(), note)
        with RichProgress(*columns, console=err(), transient=True, redirect_stdout=False) as self._live:
            try:
                yield self._live
            finally:
                self._live = None

    def say(self, text: str) -> None:
        _line(self._live.console if self._live else err(), text)


class _LineTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note, self._last = 0.0, "", time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if time.monotonic() - self._last >= QUIET_SECONDS:
            self._last = time.monotonic()
            whole = f" of {self._count(self._total)}" if self._total else ""
            _line(err(), f"{self._description}: {self._count(self._done)}{whole} {self._note}".rstrip())

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
        _line(err(), text)


def progress() -> Progress:
    """Bars on a terminal, lines elsewhere."""
    if env.rank() > 0:
        return silent
    return _Bars() if sys.stderr.isatty() and not err().is_dumb_terminal else _Lines()
