"""What a process of its own tells the one that started it: how it gets on, then its answer or its error.

It says so on its stdout, one JSON object a line; whatever else is printed there goes to stderr. `of`: which of the
open tasks, the outermost is 0.

    {"task": ["the truth in fp32", 43, ""]}   {"advance": 1, "of": 0}   {"note": "…", "of": 0}   {"end": 0}
    {"say": "…"}   {"answer": {…}}   {"error": "…", "hint": "…", "exit_status": 1}
    {"errno": 13, "strerror": "Permission denied", "filename": "…", "traceback": "…"}   {"bug": "…", "traceback": "…"}
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from sparkctl import child
from sparkctl.errors import SparkError, UsageError, memory_ended, memory_error
from sparkctl.progress import Progress, Task, silent


class Bug(Exception):
    """A bug in the other process, told with its traceback: one here too."""


class Teller:
    """Progress that is shown by the process which listens, and the answer to it."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._open = out, 0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """A task there."""
        self.tell(task=[description, total, unit])
        task = _ToldTask(self, self._open)
        self._open += 1
        try:
            yield task
        finally:
            self._open -= 1
            self.tell(end=self._open)

    def say(self, text: str) -> None:
        """A line there."""
        self.tell(say=text)

    def answer(self, answer: dict[str, Any]) -> None:
        """What this process was started for."""
        self.tell(answer=answer)

    def tell(self, **message: Any) -> None:
        """One line. Ends this process where nobody listens any more."""
        try:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        except BrokenPipeError:
            os._exit(1)


class _ToldTask:
    def __init__(self, teller: Teller, of: int) -> None:
        self._teller, self._of = teller, of

    def advance(self, amount: float = 1) -> None:
        self._teller.tell(advance=amount, of=self._of)

    def note(self, text: str) -> None:
        self._teller.tell(note=text, of=self._of)


@contextmanager
def telling() -> Iterator[Teller]:
    """This process's whole work. An error with which the block ends, a bug's too, is the listener's to raise."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    teller = Teller(out)
    try:
        yield teller
    except SparkError as error:
        _fail(teller, error)
    except Exception as error:
        if memory_ended(error):
            _fail(teller, memory_error(error))
        teller.tell(**_told(error), traceback=traceback.format_exc())
        raise SystemExit(1) from None


def _told(error: Exception) -> dict[str, Any]:
    """What makes it anew: of the system's refusals as they are, of everything else its name and text."""
    if not isinstance(error, OSError) or error.errno is None:
        return {"bug": traceback.format_exception_only(error)[-1].strip()}
    name = None if error.filename is None else str(error.filename)
    return {"errno": error.errno, "strerror": error.strerror, "filename": name}


def _fail(teller: Teller, error: SparkError) -> None:
    teller.tell(error=error.message, hint=error.hint, exit_status=error.exit_status)
    raise SystemExit(error.exit_status)


def listen(module: str, *arguments: str, what: str, hint: str, progress: Progress) -> dict[str, Any]:
    """The answer of a module whose work is done under `telling`, in a process of its own; its progress is shown here.

    Raises the error that it tells of: SparkError, OSError where the system refused something, Bug. Where it ends
    without a word, SparkError says how `what` ended, with `hint`.
    """
    with beside(module, *arguments, what=what, hint=hint, progress=progress) as answer:
        return answer()


@contextmanager
def beside(
    module: str, *arguments: str, what: str, hint: str, progress: Progress = silent
) -> Iterator[Callable[[], dict[str, Any]]]:
    """The same while the block does other work: what is given waits for the answer. Without it, the process is ended
    with the block.
    """
    with child.beside(module, *arguments) as listened:

        def answer() -> dict[str, Any]:
            listener = _Listener(progress)
            ended = listened(listener.hear)
            if ended.problem or listener.answer is None:
                raise SparkError(f"{what} failed: {ended.problem or 'no answer'}", hint)
            return listener.answer

        yield answer


class _Listener:
    def __init__(self, progress: Progress) -> None:
        self.answer: dict[str, Any] | None = None
        self._progress = progress

    def hear(self, lines: Iterable[str]) -> None:
        """All that is told."""
        self._follow(map(json.loads, lines), ())

    def _follow(self, messages: Iterator[dict[str, Any]], tasks: Sequence[Task]) -> None:
        """What is told up to the end of the innermost task."""
        for message in messages:
            match message:
                case {"task": [description, total, unit]}:
                    with self._progress.task(description, total, unit) as task:
                        self._follow(messages, (*tasks, task))
                case {"end": _}:
                    return
                case {"advance": amount, "of": number}:
                    tasks[number].advance(amount)
                case {"note": text, "of": number}:
                    tasks[number].note(text)
                case {"say": text}:
                    self._progress.say(text)
                case {"answer": answer}:
                    self.answer = answer
                case {"error": text, "hint": hint, "exit_status": status}:
                    raise (UsageError if status == UsageError.exit_status else SparkError)(text, hint)
                case {"errno": number, "strerror": reason, "filename": name, "traceback": there}:
                    raise _anew(OSError(number, reason, name), there)
                case {"bug": text, "traceback": there}:
                    raise _anew(Bug(text), there)


def _anew(error: Exception, there: str) -> Exception:
    """The error with where it came from, for a traceback here."""
    error.add_note(f"in the other process:\n{there}")
    return error
