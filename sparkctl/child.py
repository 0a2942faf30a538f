"""Work in a process of its own: a crash, a hang or a trap there costs one answer, and its memory ends with it.

Two ways to hear from it: `answers` is for probes that may die at any word, where what was said before counts; `telling`
is for long work, whose progress is shown as it comes and whose error is the user's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

INTERRUPTED = "was not tried: interrupted"
LINE = 300  # characters of an error that are passed on
_running: set[subprocess.Popen[str]] = set()
_pools: list[ThreadPoolExecutor] = []  # that are open
_over = threading.Event()  # a signal has ended the work of every pool: nothing is started any more


@dataclass(frozen=True)
class Ended:
    """What a process said, as far as it came. problem: why it has no answer, None where it ended well."""

    out: str = ""
    err: str = ""
    problem: str | None = None


def module(
    name: str, *arguments: str, seconds: float | None, input: str = "", environment: Mapping[str, str] | None = None
) -> Ended:
    """`python -m NAME ARGUMENTS` with this interpreter. The working folder is not on its path, as for `sparkctl`."""
    return run(_line(name, *arguments), seconds=seconds, input=input, environment=environment)


def answer(
    name: str, *arguments: str, seconds: float | None, input: str = "", environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str | None]:
    """(the JSON object on the last line that a module of ours prints, None) or ({}, why there is none)."""
    ended = module(name, *arguments, seconds=seconds, input=input, environment=environment)
    if ended.problem:
        return {}, ended.problem
    lines = ended.out.strip().splitlines()
    said = _object(lines[-1]) if lines else None
    return ({}, "ended without an answer") if said is None else (said, None)


def answers(name: str, *arguments: str, seconds: float | None) -> tuple[dict[str, Any], str | None]:
    """(the JSON objects of all lines in one, why there are no more): what was said before it failed counts."""
    ended = module(name, *arguments, seconds=seconds)
    said = [found for line in ended.out.splitlines() if (found := _object(line)) is not None]
    problem = ended.problem or (None if said else "ended without an answer")
    return {key: value for one in said for key, value in one.items()}, problem


def _object(line: str) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def run(
    command: Sequence[str], *, seconds: float | None, input: str = "", environment: Mapping[str, str] | None = None
) -> Ended:
    """The command in a session of its own, which ends as a whole when its time is over; None: it has all it wants.

    environment: in place of this process's.
    """
    if _over.is_set():
        return Ended(problem=INTERRUPTED)
    pipe = subprocess.PIPE
    try:
        with _started(command, environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            out, err = process.communicate(input, timeout=seconds)
    except subprocess.TimeoutExpired as over:
        said = over.stdout.decode(errors="replace") if isinstance(over.stdout, bytes) else over.stdout
        return Ended(said or "", problem=f"did not end within {seconds:g} s")
    except OSError as error:
        return Ended(problem=f"`{command[0]}` does not start: {(error.strerror or str(error)).lower()}")
    return Ended(out, err, _problem(process.returncode, err))


def listen(name: str, *arguments: str, hear: Callable[[Iterable[str]], None]) -> Ended:
    """The same as `module` where it works for long: `hear` is given its lines as they come. Its stderr is this one's.

    Where `hear` raises, the process is ended.
    """
    with beside(name, *arguments) as listened:
        return listened(hear)


@contextmanager
def beside(name: str, *arguments: str) -> Iterator[Callable[[Callable[[Iterable[str]], None]], Ended]]:
    """The same while the block does other work; what is given lets `hear` listen, and waits for the process's end.

    A process that nobody has waited for is ended with the block.
    """
    stdin, stdout = subprocess.DEVNULL, subprocess.PIPE
    with _started(_line(name, *arguments), stdin=stdin, stdout=stdout) as process:
        assert process.stdout
        with process.stdout as lines:

            def listened(hear: Callable[[Iterable[str]], None]) -> Ended:
                hear(lines)
                lines.close()
                process.wait()
                return Ended(problem=_problem(process.returncode, ""))

            yield listened
        _kill(process)


def _line(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", name, *arguments]


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str] | None = None, **streams: int
) -> Iterator[subprocess.Popen[str]]:
    """The process, killed with its session where the block ends in an error: nothing is left running."""
    process = subprocess.Popen(  # type: ignore[call-overload]  # mypy knows no streams by name
        command, text=True, errors="replace", start_new_session=True, env=environment, **streams
    )
    _running.add(process)
    if _over.is_set():  # since it was looked at
        _kill(process)
    try:
        yield process
    except BaseException:  # Ctrl-C too
        _kill(process)
        raise
    finally:
        _running.discard(process)


@contextmanager
def at_once(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each wait for a process, or open such a pool themselves.

    A signal, which is heard in the outermost block, ends all that any of them waits for; an error ends this pool alone.
    """
    pool = ThreadPoolExecutor(count)
    _pools.append(pool)
    try:
        yield pool
    except Exception:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        _over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(_running):
            _kill(process)
        raise
    finally:
        pool.shutdown()
        _pools.remove(pool)
        if not _pools:
            _over.clear()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is not None:  # waited for: its number may be another's by now
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that waits for its driver may not even die
        process.wait(timeout=2)


def _problem(status: int, err: str) -> str | None:
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    if status:
        lines = err.strip().splitlines()
        return lines[-1].strip()[:LINE] if lines else f"exit status {status}"
    return None
