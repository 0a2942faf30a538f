"""Results that come one by one, as a benchmark's do: none is lost where a signal ends the work before its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rich.console import RenderableType

from sparkctl.cli import console
from sparkctl.errors import Terminated, interruption
from sparkctl.progress import Progress

T = TypeVar("T")


def answer(
    rows: Iterable[T], line: Callable[[T], str], as_json: Callable[[list[T]], dict[str, Any]],
    table: Callable[[list[T]], RenderableType], *, json: bool, progress: Progress,
) -> list[T]:  # fmt: skip
    """Say each row on stderr as soon as it is there, and all of them as the command's answer; see `told`."""

    def work(tell: Callable[[T], None]) -> None:
        for row in rows:
            tell(row)

    return told(work, line, as_json, table, json=json, progress=progress)


def told(
    work: Callable[[Callable[[T], None]], None], line: Callable[[T], str],
    as_json: Callable[[list[T]], dict[str, Any]], table: Callable[[list[T]], RenderableType], *, json: bool,
    progress: Progress,
) -> list[T]:  # fmt: skip
    """The same where `work` tells of each row.

    On Ctrl-C or SIGTERM the rows that are there are the answer, under --json within the failure's one object. Raises
    Interrupted then.
    """
    done: list[T] = []

    def tell(row: T) -> None:
        done.append(row)
        progress.say(line(row))

    try:
        work(tell)
    except (KeyboardInterrupt, Terminated) as stop:
        if done and not json:
            console.answer({}, table(done), json=False)
        raise interruption(stop, as_json(done) if done else None) from None
    console.answer(as_json(done), table(done), json=json)
    return done
