"""sparkctl's commands as a user starts them, each in a process of its own, with a limit, its words kept in files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 12  # lines of stderr that a failure shows
SHOWN = 600  # characters of an answer that a failure shows
LOOK = 0.01  # seconds between looks at a training that is to be killed


class Failed(Exception):
    """A command that did not do what it should; the text is for a person."""


@dataclass(frozen=True)
class Commands:
    """logs: where stdout and stderr of each go; until: the monotonic second at which all of them have to be over.

    own: variables beside those of this process. running: what has not ended yet.
    """

    logs: Path
    until: float
    own: dict[str, str] = field(default_factory=dict)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def sparkctl(self, label: str, *words: object, seconds: float) -> dict[str, Any]:
        """The JSON answer of `sparkctl WORDS --json`. Raises Failed where it gives none, or says that it failed.

        A check that found something answers all the same, with `ok` false and its problems.
        """
        return self.python(label, "-m", "sparkctl", *words, "--json", seconds=seconds)

    def python(self, label: str, *words: object, seconds: float) -> dict[str, Any]:
        """The JSON object on the last line that `python WORDS` prints."""
        process = self._start(label, words)
        status = self._wait(label, process, seconds)
        lines = self._file(label, "out").read_text(errors="replace").strip().splitlines()
        try:
            answer = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise Failed(self._told(label, f"ended with status {status}")) from None
        if status and "problems" not in answer:
            raise Failed(self._told(label, f"ended with status {status}: {answer.get('error') or lines[-1][:SHOWN]}"))
        return dict(answer)

    def killed(self, label: str, *words: object, when: Callable[[], bool], seconds: float) -> None:
        """Start `sparkctl WORDS`, and kill it with SIGKILL once `when` holds. Raises Failed where it ends before."""
        process, began = self._start(label, ("-m", "sparkctl", *words, "--json")), time.monotonic()
        limit = self._limit(seconds)
        while process.poll() is None and not when():
            if time.monotonic() - began > limit:
                self._end(process)
                raise Failed(self._told(label, f"took more than {limit:.0f} s to get where it was to be killed"))
            time.sleep(LOOK)
        self._end(process)
        if process.returncode != -signal.SIGKILL:
            raise Failed(self._told(label, f"ended with status {process.returncode} before it could be killed"))

    def _start(self, label: str, words: Sequence[object]) -> subprocess.Popen[bytes]:
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._file(label, "out").open("wb") as out, self._file(label, "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0,
                env={**os.environ, **self.own},
            )  # fmt: skip
        self.running.add(process)
        return process

    def _wait(self, label: str, process: subprocess.Popen[bytes], seconds: float) -> int:
        limit = self._limit(seconds)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failed(self._told(label, f"took more than {limit:.0f} s")) from None
        finally:
            self._end(process)

    def end(self) -> None:
        """Kill whatever still runs."""
        for process in list(self.running):
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process and what it started, where it still runs."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.running.discard(process)

    def _limit(self, seconds: float) -> float:
        return max(1.0, min(seconds, self.until - time.monotonic()))

    def _file(self, label: str, kind: str) -> Path:
        return self.logs / f"{label}.{kind}"

    def _told(self, label: str, what: str) -> str:
        last = self._file(label, "err").read_text(errors="replace").strip().splitlines()[-TAIL:]
        return "\n".join([f"{label} {what}", *last])
