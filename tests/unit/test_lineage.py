from __future__ import annotations

import shutil
from pathlib import Path

from sparkctl.manifest.lineage import ancestors, missing_parent
from sparkctl.manifest.store import Run


def rounds(folder: Path, count: int) -> list[Run]:
    made: list[Run] = []
    for i in range(count):
        made.append(Run.create(folder / f"r{i}", parent=made[-1] if made else None))
    return made


def names(runs: list[Run]) -> list[str]:
    return [run.manifest.run.name for run in runs]


def test_from_a_round_back_to_the_first(tmp_path: Path) -> None:
    made = rounds(tmp_path, 4)
    assert names(ancestors(made[3])) == ["r2", "r1", "r0"]
    assert ancestors(made[0]) == []
    assert missing_parent(made[3]) is None


def test_the_row_ends_where_a_folder_is_gone(tmp_path: Path) -> None:
    made = rounds(tmp_path, 3)
    shutil.rmtree(made[0].root)
    assert names(ancestors(made[2])) == ["r1"]
    assert missing_parent(made[1]) == str(made[0].root)


def test_a_circle_ends(tmp_path: Path) -> None:
    made = rounds(tmp_path, 2)
    with made[0].edit() as manifest:
        manifest.run.parent = "../r1"
    assert names(ancestors(made[1])) == ["r0"]


def test_a_moved_family_finds_itself(tmp_path: Path) -> None:
    made = rounds(tmp_path / "here", 2)
    there = Path(shutil.move(tmp_path / "here", tmp_path / "there"))
    assert names(ancestors(Run.open(there / made[1].root.name))) == ["r0"]
