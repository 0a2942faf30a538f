"""`make check-pins`: which pins of the lock the registry has. pip is a stand-in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import check_pins
import pins
import pytest


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the registry has: name → pip's line of versions. It starts with all that the lock wants."""
    lock = pins.read("unsloth", "3.12", "aarch64")
    has = {name: f"9.9.9, {pins.version(pin)}" for name, pin in lock.items()}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "index"]
        assert command[command.index("--python-version") + 1] == "3.12"
        assert "manylinux_2_28_aarch64" in command
        name = next(word for word in command[4:] if word in has or word in lock)
        if name not in has:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found")
        return subprocess.CompletedProcess(command, 0, f"{name} (9.9.9)\nAvailable versions: {has[name]}\n", "")

    monkeypatch.setattr(check_pins.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["check_pins.py"])
    return has


def test_all_are_there(registry: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_pins.main()
    said = capsys.readouterr()
    assert ended.value.code == 0
    count = len(registry)
    assert said.out == f"unsloth, Python 3.12 on aarch64: {count} of {count} pins are in the registry\n"
    assert {"causal-conv1d", "unsloth", "pytest", "torch"} <= set(registry)
    assert "xformers" not in registry  # x86-64 alone


def test_those_that_are_not_are_named(registry: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    registry["transformers"] = "5.18.0, 5.16.0"
    registry["torch"] = "2.13.0, 2.10.0"
    del registry["causal-conv1d"]
    with pytest.raises(SystemExit) as ended:
        check_pins.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert sorted(said) == [
        "error: no causal-conv1d at all: ERROR: No matching distribution found",
        "error: no torch==2.11.* among 2.13.0, 2.10.0",
        "error: no transformers==5.17.0 among 5.18.0, 5.16.0",
    ]


def test_a_name_that_is_pinned_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.txt").write_text("rich==15.0.0\n")
    (tmp_path / "all.txt").write_text("# two\n-c base.txt\nRich==14.0.0\n")
    monkeypatch.setattr(pins, "LOCKS", tmp_path)
    with pytest.raises(ValueError, match="rich is pinned twice in all"):
        pins.read("all", "3.12", "aarch64")
