"""Commands, run in this process through the error boundary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from analyzing import Analyze, Answer
from showing import Say

from sparkctl.cli import app
from sparkctl.steps import certificate_process


@pytest.fixture
def analyze(capsys: pytest.CaptureFixture[str], qwen35_folder: Path) -> Analyze:
    """Run the command with --json; the model is the tiny one unless `model=None` or another is given."""

    def run(*arguments: object, model: Path | None = qwen35_folder, json: bool = True) -> Answer:
        line = ["analyze", *map(str, arguments), *(["--model", str(model)] if model else []), *["--json"] * json]
        status = app.run(line)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """These lines run first in the processes that measure a certificate's engines, and in no other."""

    def plant(lines: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        body = "".join(f"    {line}\n" for line in lines.strip().splitlines())
        child = f"if {certificate_process.__name__!r} in sys.orig_argv:\n{body}"
        (folder / "sitecustomize.py").write_text(f"import os, sys, time\n{child}")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))

    return plant


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a part of `bench` with --json: (status, the object)."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = app.run(["bench", *map(str, arguments), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command, which has to end well; its stdout."""

    def call(*arguments: object, status: int = 0) -> str:
        assert app.run([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return call
