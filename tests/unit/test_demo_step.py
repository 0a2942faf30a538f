"""The demo keeps to its own folder, and fails where a promise is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparkctl.cli.app import run
from sparkctl.errors import UsageError
from sparkctl.manifest.evidence import Acceptance
from sparkctl.steps.demo import MARK, Answer, Demo, claim
from sparkctl.steps.killing import last_step
from sparkctl.steps.mtp_eval import SHIPPED, TRAINED


def test_a_folder_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(["demo", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "error:" in said
    assert "hint: sparkctl demo" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError):
        claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_earlier_demo_is_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "demo"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    claim(folder)
    (folder / "run").mkdir()
    (folder / "run" / "run.toml").write_text("schema = 1")
    (folder / "link").symlink_to(outside)
    claim(folder)
    assert [path.name for path in folder.iterdir()] == [MARK]
    assert (outside / "kept").read_text() == "mine"


def row(name: str, accepted: float) -> Acceptance:
    return Acceptance(
        name=name, prompts=9, tokens=90, drafts=30, conditional=[accepted], cumulative=[accepted],
        mean_accepted=accepted, shorter=[], made_from="test",
    )  # fmt: skip


def drafts(shipped: float, trained: float) -> list[Acceptance]:
    return [row(SHIPPED, shipped), row(TRAINED, trained)]


def good(**changes: object) -> Demo:
    answers = [Answer(f"question {i}", "taught", "plain", "taught") for i in range(40)]
    values = dict(folder=Path("demo"), killed_at=30, resumed_from=20, steps=80, final_loss=0.05, answers=answers)
    values |= dict(drafts=drafts(0.4, 0.8))
    return Demo(**(values | changes))  # type: ignore[arg-type]


def test_a_kept_promise_is_no_problem() -> None:
    assert good().problems == []


@pytest.mark.parametrize(
    "changes",
    [
        {"final_loss": 0.2},
        {"final_loss": float("nan")},
        {"resumed_from": 0},
        {"killed_at": 80},
        {"answers": [Answer("q", "taught", "taught", "taught")] * 40},
        {"answers": [Answer("q", "taught", "plain", "taught")] * 37 + [Answer("q", "taught", "plain", "x")] * 3},
        {"answers": []},
        {"drafts": drafts(0.8, 0.8)},
        {"drafts": []},
    ],
)
def test_each_broken_promise_is_named(changes: dict[str, object]) -> None:
    assert len(good(**changes).problems) == 1


def test_a_metrics_line_cut_by_the_kill_is_passed_over(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert last_step(tmp_path) == 3
