"""Runs with a head in them that are copied, or whose served folder is to be written again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from injecting import inject, merged  # noqa: F401  # a fixture

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run
from sparkctl.steps.show import show


def test_show_names_the_command_that_wrote_it(run: Run, tmp_path: Path) -> None:
    """Into which model, with whose head, where."""
    tiny.hybrid(tmp_path / "other", seed=4)
    written = ["r1", "--mode", "default", "--into", "other", "--from", "base", "--out", "made"]
    own = ["r1", "--mode", "default"]
    for command in (written, [*written[:5], "--out", "made"], [*own, "--from", "other2"], [*own, "--link"], own):
        if "other2" in command:
            tiny.qwen35(tmp_path / "other2", seed=9)
        inject(*command, "--force")
        served = Path(command[-1] if "--out" in command else "r1/served")
        next(served.glob("model-mtp*")).unlink()
        step = show(Path("r1")).steps[-1]
        assert (step.name, step.problem) == ("mtp inject", "; the folder is not what was written")
        assert step.mend
        words = step.mend.split()
        assert words[-1] == "--force"
        assert set(words) >= set(command) - {"--from", "base"}
        assert ("--link" in words) == ("--link" in command)
        assert sparkctl(words[1:]) == 0
        assert show(Path("r1")).steps[-1].problem != step.problem


def test_a_copied_run_has_no_merged_model_but_its_own(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The run that it was copied from is still there."""
    shutil.copytree("r1", "r2")
    shutil.rmtree("r2/merged")
    for command in (["inject", "r2", "--mode", "default"], ["eval", "r2"]):
        capsys.readouterr()
        assert sparkctl(["mtp", *command]) == 2
        text = capsys.readouterr().err
        assert "error: `r2/merged` is gone" in text
        assert "hint: sparkctl merge r2 --force" in text
    assert not Path("r2/served").exists()
