"""A bit that flips in a file, and what a command then says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkctl.cli import app

Said = pytest.CaptureFixture[str]


def flip(path: Path) -> None:
    """One bit, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def said(captured: Said, *arguments: object) -> tuple[int, str]:
    """(exit status, all that was printed)."""
    captured.readouterr()
    status = app.run([str(argument) for argument in arguments])
    out = captured.readouterr()
    assert "Traceback" not in out.err
    return status, out.out + out.err
