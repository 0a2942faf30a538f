"""A folder that takes another's place: one of the two is there, whatever stops it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparkctl.files import staged_folder


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_what_was_there_stays_where_the_exchange_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    final, replace, calls = tmp_path / "merged", os.replace, 0
    final.mkdir()
    (final / "weights").write_text("old")

    def stopping(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == stopped_at:
            raise KeyboardInterrupt
        replace(source, target)

    def exchange() -> None:
        with staged_folder(final, replace=True) as stage:
            (stage / "weights").write_text("new")

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        exchange()
    assert (final / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]
    monkeypatch.setattr(os, "replace", replace)
    exchange()
    assert (final / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [final]
