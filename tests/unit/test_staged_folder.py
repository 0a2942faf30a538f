"""A folder that takes another's place: one of the two is there, whatever stops it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparkctl.files import staged_folder, sweep_stages


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


def test_what_was_there_is_put_back_where_a_kill_came_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, replace = tmp_path / "merged", os.replace
    final.mkdir()
    (final / "weights").write_text("old")

    def dying(source: Path, target: Path) -> None:
        replace(source, target)
        os._exit(1)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", dying)
        with staged_folder(final, replace=True) as stage:
            (stage / "weights").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not final.exists()
    sweep_stages(tmp_path, "other")
    assert not final.exists()
    sweep_stages(tmp_path, "merged")
    assert (final / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_another_folder_s_stage_is_left_alone_though_its_name_begins_alike(tmp_path: Path) -> None:
    (tmp_path / ".merged.x1.tmp").mkdir()
    (tmp_path / ".merged.x2.old.tmp").mkdir()
    with staged_folder(tmp_path / "merged.v2") as stage:
        sweep_stages(tmp_path, "merged")
        assert list(tmp_path.iterdir()) == [stage]


def test_what_was_taken_away_does_not_come_back_beside_the_new(tmp_path: Path) -> None:
    for place in (tmp_path / "merged", tmp_path / ".merged.x1.old.tmp" / "merged", tmp_path / ".step-1.old.tmp"):
        place.mkdir(parents=True)
        (place / "weights").write_text(place.parent.name)
    sweep_stages(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]
    assert (tmp_path / "merged" / "weights").read_text() == tmp_path.name
