"""A training killed with SIGKILL at a known step, in a process of its own: `python -m sparkctl.steps.killing RUN STEP`.

The kill comes the moment that step is done and before anything more is saved, however fast the training is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from sparkctl.errors import SparkError
from sparkctl.manifest.store import Run
from sparkctl.progress import Task
from sparkctl.words import quoted

TRAINING = "training"  # what the loop calls its own task


def killed_training(run: Path, after: int, *, allow_slow: bool = False) -> int:
    """Train `run` and kill it `after` steps past its first checkpoint; the last step that it told of.

    Raises SparkError where it ended in another way.
    """
    plan = Run.open(run).manifest.plan
    assert plan
    at = plan.save_every + after
    command = [sys.executable, "-m", "sparkctl.steps.killing", str(run), str(at), *["slow"] * allow_slow]
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        if process.returncode != -signal.SIGKILL:
            log.seek(0)
            raise SparkError(
                f"the training ended with status {process.returncode} before it could be killed:\n{log.read().strip()}",
                f"sparkctl train {quoted(run)}",
            )
    return last_step(run)


def last_step(run: Path) -> int:
    """The last optimiser step that metrics.jsonl tells of; 0 where there is none."""
    from sparkctl.train.metrics import read

    return max((line["step"] for line in read(run / "metrics.jsonl")), default=0)


class Killer:
    """Progress that says nothing, and kills this process once training has done `at` steps."""

    def __init__(self, at: int) -> None:
        self._left, self._watching = float(at), False

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """A task; that of training is counted."""
        self._watching = description == TRAINING
        yield self

    def advance(self, amount: float = 1) -> None:
        """So many steps more."""
        if self._watching:
            self._left -= amount
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def note(self, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def main() -> None:
    """The command of this module."""
    from sparkctl.steps.train import train

    run, at, *slow = sys.argv[1:]
    try:
        train(Path(run), progress=Killer(int(at)), allow_slow=bool(slow), certificate=False)
    except SparkError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
