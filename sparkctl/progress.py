"""What a long piece of work says while it runs; `sparkctl.cli.console` draws it, tests pass `silent`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar: `advance` adds to it, `note` sets the text behind it (a loss, a rate)."""

    def advance(self, amount: float = 1) -> None: ...

    def note(self, text: str) -> None: ...


class Progress(Protocol):
    """Where bars come from. `unit` is what is counted ("B" counts bytes and is shown as MB, GB)."""

    def task(self, description: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]: ...

    def say(self, text: str) -> None:
        """One line on stderr, above any bar."""
        ...


class _Silent:
    def advance(self, amount: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield self

    def say(self, text: str) -> None:
        pass


silent: Progress = _Silent()
