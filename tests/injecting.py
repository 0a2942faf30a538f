"""What the tests of `sparkctl mtp inject` share: a merged run, the command, its answer and its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import merging_run
import pytest

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run

Said = pytest.CaptureFixture[str]
TRAINED, DEFAULT = ("r1", "--mode", "trained"), ("r1", "--mode", "default")


@pytest.fixture(name="said")
def captured(capsys: Said) -> Said:
    """stdout and stderr."""
    return capsys


@pytest.fixture(name="run")
def merged(qwen35_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is merged, its base beside it."""
    base = Path(shutil.copytree(qwen35_folder, tmp_path / "base"))
    made = merging_run.trained_run(tmp_path / "r1", base)
    monkeypatch.chdir(tmp_path)
    assert sparkctl(["merge", "r1"]) == 0
    return Run.open(made.root)


def inject(*arguments: str, status: int = 0) -> None:
    """The command, with the status that it should end in."""
    assert sparkctl(["mtp", "inject", *arguments]) == status


def answer(said: Said, *arguments: str) -> dict[str, Any]:
    """Its JSON object."""
    said.readouterr()
    inject(*arguments, "--json")
    return json.loads(said.readouterr().out)


def refused(said: Said, status: int, *arguments: str) -> str:
    """What stderr says of a command that fails as it should; served/ is not there, or what it was."""
    served = Path("r1/served")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in served.rglob("*"))
    said.readouterr()
    inject(*arguments, status=status)
    text = said.readouterr().err
    assert text.startswith("error: ")
    assert "\nhint: " in text
    assert sorted((path.name, path.stat().st_mtime_ns) for path in served.rglob("*")) == before
    assert not list(Path("r1").glob(".served.*"))
    return text
