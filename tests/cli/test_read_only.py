"""A finished run on a read-only mount: what only has to say so says so, what would write says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import holding
import merging_run
import pytest
import ready
import tiny

from sparkctl.cli.app import run as sparkctl
from sparkctl.files import sha256_file
from sparkctl.manifest.store import Run

Said = pytest.CaptureFixture[str]
Mount = Callable[[Path], None]


@pytest.fixture
def finished(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is trained and merged, beside the working folder's others."""
    run = ready.run(tmp_path / "r1", llama_folder, count=12, max_steps=3)
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.chat_template.sha256 = sha256_file(run.root / "chat_template.jinja")
    monkeypatch.chdir(tmp_path)
    assert [sparkctl([command, "r1"]) for command in ("train", "merge")] == [0, 0]
    return run.root


@pytest.mark.parametrize("command", ["train", "resume", "merge"])
def test_what_is_done_is_up_to_date(finished: Path, read_only: Mount, capsys: Said, command: str) -> None:
    read_only(finished)
    with pytest.raises(OSError, match="Read-only"):
        (finished / "x").touch()
    capsys.readouterr()
    assert sparkctl([command, "r1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True


def test_a_merge_that_another_followed_is_up_to_date(finished: Path, read_only: Mount, capsys: Said) -> None:
    """The manifest speaks of the last one, and stays as it is."""
    assert sparkctl(["merge", "r1", "--out", "elsewhere"]) == 0
    read_only(finished)
    capsys.readouterr()
    assert sparkctl(["merge", "r1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True
    merge = Run.open(finished).manifest.merge
    assert merge
    assert merge.folder == "../elsewhere"


def test_an_analysis_of_data_that_have_another_name_by_now_is_up_to_date(
    tmp_path: Path, llama_folder: Path, read_only: Mount, capsys: Said
) -> None:
    """Nothing is lost where their name cannot be written down."""
    data, run = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r2"
    assert sparkctl(["analyze", str(data), "--run", str(run), "--model", str(llama_folder)]) == 0
    moved = data.rename(tmp_path / "elsewhere.jsonl")
    read_only(run)
    capsys.readouterr()
    assert sparkctl(["analyze", str(moved), "--run", str(run), "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True
    assert sparkctl(["analyze", str(moved), "--run", str(run), "--recipe", "qwen3.5-0.8b-lora"]) == 1  # a wish is told


def test_it_is_shown(finished: Path, read_only: Mount, capsys: Said) -> None:
    read_only(finished)
    capsys.readouterr()
    assert sparkctl(["show", "r1", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert {steps[name]["status"] for name in ("train", "merge")} == {"done"}


@pytest.mark.parametrize(
    "line", ["train r1 --force", "merge r1 --force", "merge r1 --out new", "resume r1 --from step-000002"]
)
def test_what_would_write_says_why_it_cannot(finished: Path, read_only: Mount, capsys: Said, line: str) -> None:
    before = (finished / "run.toml").read_bytes()
    read_only(finished)
    capsys.readouterr()
    assert sparkctl(line.split()) == 1
    assert capsys.readouterr().err == (
        "error: nothing can be written to `r1`: it is read-only\nhint: work on a copy: `cp -r r1 FOLDER`\n"
    )
    assert (finished / "run.toml").read_bytes() == before


def test_a_step_that_works_on_the_other_side_is_seen(
    tmp_path: Path, qwen35_folder: Path, read_only: Mount, capsys: Said
) -> None:
    """A folder mounted twice, read-only here: the lock is asked without writing."""
    run = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    with holding.training(run.root) as process:
        read_only(run.root)
        assert run.running() == "train"
        assert sparkctl(["merge", str(run.root)]) == 1
        assert f"`train` is running (process {process.pid})" in capsys.readouterr().err
