"""Which folders a run remembers that it wrote, once other steps or runs have written there."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import merging_run
from injecting import DEFAULT, inject, merged  # noqa: F401  # a fixture

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run


def merge(run: str, *options: str) -> None:
    assert sparkctl(["merge", run, *options]) == 0


def listed(run: Run) -> set[tuple[str, str]]:
    """Kind and path of the folders among [[checkpoints]]."""
    entries = Run.open(run.root).manifest.checkpoints
    return {(entry.kind, entry.path) for entry in entries if entry.kind in ("merged", "served")}


def remembered(run: Run) -> list[str]:
    """The folders of [merge] but the last one."""
    table = Run.open(run.root).manifest.merge
    assert table
    return [other.folder for other in table.others or ()]


def test_a_merge_whose_folder_another_step_wrote_since(run: Run) -> None:
    merge("r1", "--out", "m")
    merge("r1")
    shutil.rmtree("m")
    inject(*DEFAULT, "--out", "m")
    assert listed(run) == {("merged", "merged"), ("served", "../m")}
    merge("r1", "--out", "n")
    assert remembered(run) == ["merged"]


def test_a_merge_whose_folder_another_run_wrote_since(run: Run) -> None:
    merging_run.trained_run(Path("r2"), Path("base"), steps=(2,))
    merge("r1", "--out", "m")
    shutil.rmtree("m")
    merge("r2", "--out", "m")
    merge("r1")
    assert remembered(run) == []
    assert listed(run) == {("merged", "merged")}


def test_a_served_folder_that_a_merge_wrote_since(run: Run) -> None:
    inject(*DEFAULT)
    shutil.rmtree("r1/served")
    merge("r1", "--out", "r1/served")
    assert listed(run) == {("merged", "merged"), ("merged", "served")}


def test_a_merge_that_the_user_changed_is_still_one(run: Run) -> None:
    """Put back, it is up to date again."""
    (run.root / "merged" / "config.json").write_text("{}")
    merge("r1", "--out", "m")
    assert remembered(run) == ["merged"]
    assert listed(run) == {("merged", "merged"), ("merged", "../m")}


def test_a_merge_that_is_the_only_one_says_nothing_of_others(run: Run) -> None:
    """A version that knows of none reads such a manifest."""
    merge("r1", "--out", "m")
    assert "others" in tomllib.loads((run.root / "run.toml").read_text())["merge"]
    shutil.rmtree("m")
    merge("r1")
    assert "others" not in tomllib.loads((run.root / "run.toml").read_text())["merge"]
