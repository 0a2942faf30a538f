"""The seal of a folder that a merge wrote: what it finds changed, and what was put beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkctl.merge.seal import Seal, intact, sealed_files, untouched, write_seal


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, Seal]:
    """A folder with files in it and in a folder of it, and its seal."""
    for name in ("config.json", "templates/tool_use.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seal = Seal(
        made_from="x", run="r", checkpoint="c", tensors=1, changed_tensors=1, bytes=1, seconds=1, created="x",
        files=sealed_files(tmp_path),
    )  # fmt: skip
    write_seal(tmp_path, seal)
    return tmp_path, seal


def test_as_it_was_written(sealed: tuple[Path, Seal]) -> None:
    assert intact(*sealed)
    assert untouched(*sealed)


@pytest.mark.parametrize("name", ["notes.txt", "templates/notes.txt", "templates/sparkctl.json", "eval/notes.txt"])
def test_a_file_of_somebody_else(name: str, sealed: tuple[Path, Seal]) -> None:
    (sealed[0] / name).parent.mkdir(exist_ok=True)
    (sealed[0] / name).write_text("mine")
    assert intact(*sealed)
    assert not untouched(*sealed)


def test_an_empty_folder_of_somebody_else(sealed: tuple[Path, Seal]) -> None:
    (sealed[0] / "mine").mkdir()
    assert not untouched(*sealed)


def test_a_link_that_leads_nowhere(sealed: tuple[Path, Seal]) -> None:
    (sealed[0] / "mine").symlink_to("nowhere")
    assert not untouched(*sealed)


def test_a_file_that_is_another_by_now(sealed: tuple[Path, Seal]) -> None:
    (sealed[0] / "config.json").write_text("another")
    assert not untouched(*sealed)
