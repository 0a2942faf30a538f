"""A process that tells another how it gets on: its progress, its answer, its errors, and what is left of either."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparkctl.errors import SparkError, UsageError
from sparkctl.progress import Progress, Task, silent
from sparkctl.telling import Bug, beside, listen

HEAD = """
import os, sys, time
from sparkctl.errors import SparkError, UsageError
from sparkctl.telling import telling
with telling() as teller:
"""
Tell = Callable[..., dict[str, Any]]


class Recorder:
    """Progress that writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        self.heard.append((description, total, unit))
        try:
            yield _Recorded(self.heard, description)
        finally:
            self.heard.append(f"end of {description}")

    def say(self, text: str) -> None:
        self.heard.append(text)


class _Recorded:
    def __init__(self, heard: list[Any], name: str) -> None:
        self._heard, self._name = heard, name

    def advance(self, amount: float = 1) -> None:
        self._heard.append((self._name, amount))

    def note(self, text: str) -> None:
        self._heard.append((self._name, text))


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Listen to a module whose work is these lines."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    def run(work: str, progress: Progress = silent) -> dict[str, Any]:
        module(tmp_path, work)
        return listen("told", what="the work", hint="try again", progress=progress)

    return run


def module(folder: Path, work: str) -> None:
    (folder / "told.py").write_text(HEAD + "".join(f"    {line}\n" for line in work.strip().splitlines()))


WORK = """
print("no message of ours")
os.write(1, b'{"say": "nor this"}\\n')
teller.say("é")
with teller.task("outer", 3, "B") as outer:
    with teller.task("inner") as inner:
        inner.advance()
        outer.advance(2)
        inner.note("x")
    outer.note("y")
teller.answer({"pid": os.getpid(), "value": 1 / 3})
"""


def test_progress_and_the_answer_of_another_process(tell: Tell, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Recorder()
    answer = tell(WORK, progress)
    assert answer["pid"] != os.getpid()
    assert answer["value"] == 1 / 3
    assert progress.heard == [
        "é", ("outer", 3, "B"), ("inner", None, ""), ("inner", 1), ("outer", 2), ("inner", "x"), "end of inner",
        ("outer", "y"), "end of outer",
    ]  # fmt: skip
    said = capfd.readouterr()
    assert said.out == ""
    assert "no message of ours" in said.err
    assert "nor this" in said.err


@pytest.mark.parametrize("kind", [SparkError, UsageError])
def test_its_errors_are_raised_here(kind: type[SparkError], tell: Tell) -> None:
    with pytest.raises(SparkError, match="it is wrong") as caught:
        tell(f'raise {kind.__name__}("it is wrong", "mend `it`")')
    assert type(caught.value) is kind
    assert caught.value.hint == "mend `it`"


@pytest.mark.parametrize("filename", ["/a/é.json", "/a/\udcff.json", None])
def test_what_the_system_refuses_there_is_raised_here(filename: str | None, tell: Tell) -> None:
    progress = Recorder()
    with pytest.raises(PermissionError) as caught:
        tell(f'with teller.task("a"):\n    raise OSError(13, "Permission denied", {filename!r})', progress)
    error = caught.value
    assert (error.errno, error.strerror, error.filename) == (errno.EACCES, "Permission denied", filename)
    assert progress.heard == [("a", None, ""), "end of a"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ('raise RuntimeError("two\\nlines")', "RuntimeError: two\nlines"),
        ('raise OSError("no number")', "OSError: no number"),
    ],
)
def test_a_bug_there_is_one_here(work: str, said: str, tell: Tell, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Bug) as caught:
        tell(work)
    assert str(caught.value) == said
    assert f'told.py", line {len(HEAD.splitlines()) + 1}, in <module>' in "".join(caught.value.__notes__)
    assert capfd.readouterr().err == ""  # once is enough


def test_memory_that_ends_there_is_an_error_with_a_hint(tell: Tell) -> None:
    with pytest.raises(SparkError, match="not enough memory") as caught:
        tell("raise MemoryError")
    assert "shows who holds it" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        ("os.kill(os.getpid(), 9)", "died of SIGKILL"),
        ("pass", "no answer"),
        ("teller.answer({}); os._exit(3)", "exit status 3"),
    ],
)
def test_an_end_without_a_word(work: str, problem: str, tell: Tell) -> None:
    progress = Recorder()
    with pytest.raises(SparkError) as caught:
        tell(f'with teller.task("a"):\n    {work}', progress)
    assert (caught.value.message, caught.value.hint) == (f"the work failed: {problem}", "try again")
    assert progress.heard == [("a", None, ""), "end of a"]  # also of one that did not say so


def test_ctrl_c_here_ends_it(tell: Tell) -> None:
    class Stop(Recorder):
        def say(self, text: str) -> None:
            super().say(text)
            raise KeyboardInterrupt

    progress = Stop()
    with pytest.raises(KeyboardInterrupt):
        tell("teller.say(str(os.getpid()))\ntime.sleep(300)", progress)
    assert gone(progress.heard[0])


@pytest.mark.parametrize("asked", [True, False])
def test_beside_other_work_it_is_waited_for_or_ended(asked: bool, tell: Tell, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    module(
        tmp_path,
        f"open({str(mark)!r}, 'w').write(str(os.getpid()))\nteller.answer({{'a': 1}})\ntime.sleep({asked or 300})",
    )
    with beside("told", what="x", hint="x") as answer:
        wait(lambda: mark.exists() and mark.read_text() != "")  # it has begun before it is asked
        if asked:
            assert answer() == {"a": 1}
    assert gone(mark.read_text())


def test_it_ends_where_nobody_listens_any_more(tmp_path: Path, tell: Tell) -> None:
    mark = tmp_path / "pid"
    module(tmp_path, f"open({str(mark)!r}, 'w').write(str(os.getpid()))\nwhile True: teller.say('x'); time.sleep(0.01)")
    program = (
        "from sparkctl.progress import silent; from sparkctl.telling import listen\n"
        "listen('told', what='x', hint='x', progress=silent)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as listening:
        wait(lambda: mark.exists() and mark.read_text() != "")
        listening.send_signal(signal.SIGKILL)
    wait(lambda: gone(mark.read_text()))


def gone(pid: str) -> bool:
    """Whether that process has ended, a zombie that nobody waits for included."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait(until: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
