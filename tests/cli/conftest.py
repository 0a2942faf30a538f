"""Commands, run in this process through the error boundary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from analyzing import Analyze, Answer

from sparkctl.cli import app


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
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a part of `bench` with --json: (status, the object)."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = app.run(["bench", *map(str, arguments), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run
