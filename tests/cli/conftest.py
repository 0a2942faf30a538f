"""Commands, run in this process through the error boundary."""

from __future__ import annotations

from pathlib import Path

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
