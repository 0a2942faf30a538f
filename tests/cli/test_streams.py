"""Streams that are closed, whose reader has gone or whose disk is full: a training goes on, and its status is told."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ready

from sparkctl.manifest.store import Run


def shell(*words: object, then: str = "") -> subprocess.CompletedProcess[str]:
    """sparkctl with these arguments in bash, which exits with its status, and `then` as redirections or a pipe."""
    line = shlex.join([str(Path(sys.executable).with_name("sparkctl")), *map(str, words)])
    script = f"{line} {then}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("then", ["2>/dev/full", "2>&1 >/dev/null | true", "2>&-", "<&- >&- 2>&-"])
def test_a_training_whose_log_is_lost_goes_on(tmp_path: Path, llama_folder: Path, then: str) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24)
    done = shell("train", run.root, then=then)
    trained = Run.open(run.root).manifest.train
    assert (done.returncode, done.stderr) == (0, "")
    assert trained
    assert (trained.status, trained.step) == ("done", trained.steps)


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_an_answer_that_cannot_be_written_is_a_failure(tmp_path: Path, llama_folder: Path, json: list[str]) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24)
    full = shell("show", run.root, *json, then=">/dev/full")
    assert (full.returncode, full.stderr.splitlines()[0]) == (1, "error: no space left on device")
    none = shell("show", tmp_path / "none", *json, then=">/dev/full")
    assert (none.returncode, "Traceback" in none.stderr) == (2, False)
    assert "is not a run" in none.stderr
