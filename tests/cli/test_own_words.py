"""Messages and hints name a run as the user named it, so that a hint can be typed where the command was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import merging_run
import pytest
import ready

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run
from sparkctl.train import state

Said = pytest.CaptureFixture[str]


def _nothing(run: Run) -> None:
    """As it was made."""


def _unplanned(run: Run) -> None:
    with run.edit() as manifest:
        manifest.plan = None


def _unanalysed(run: Run) -> None:
    with run.edit() as manifest:
        manifest.analysis = None


def _other_tokens(run: Run) -> None:
    (run.root / "tokens" / "store.json").unlink(missing_ok=True)
    with run.edit() as manifest:
        assert manifest.analysis
        manifest.analysis.digest = "another"


def _trained_otherwise(run: Run) -> None:
    assert sparkctl(["train", str(run.root)]) == 0
    with run.edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate = 1e-3


def _without_a_checkpoint(run: Run) -> None:
    assert sparkctl(["train", str(run.root)]) == 0
    for checkpoint in state.listed(run.root / "checkpoints"):
        state.remove(checkpoint)


def _without_held_out(run: Run) -> None:
    with run.edit() as manifest:
        assert manifest.analysis
        manifest.analysis.eval_examples = 0


@pytest.mark.parametrize("name", ["runs/r1", "runs/../runs/my run"])
@pytest.mark.parametrize(
    ("before", "command", "hint"),
    [
        (_unanalysed, "train", "sparkctl analyze DATA --run {run} --model MODEL"),
        (_unplanned, "train", "sparkctl recommend {run}"),
        (_other_tokens, "train", "sparkctl analyze DATA --run {run} --force"),
        (_trained_otherwise, "train", "`sparkctl train {run} --force` begins anew; or analyze into a new run"),
        (_trained_otherwise, "resume", "sparkctl train {run} --force"),
        (_without_a_checkpoint, "train", "sparkctl resume {run}"),
        (_nothing, "resume", "sparkctl train {run}"),
        (_nothing, "merge", "sparkctl train {run}"),
    ],
)
def test_a_hint_names_the_run_as_the_user_did(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, name: str,
    before: Callable[[Run], None], command: str, hint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before(ready.run(Path(name), llama_folder, count=12, max_steps=3))
    capsys.readouterr()
    assert sparkctl([command, name]) == 2
    said = capsys.readouterr().err
    word = f"'{name}'" if " " in name else name
    assert said.splitlines()[-1] == "hint: " + hint.format(run=word)
    assert str(tmp_path) not in said


def test_a_damaged_checkpoint_too(
    tmp_path: Path, qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    run = merging_run.trained_run(Path("r1"), qwen35_folder)
    (run.root / "checkpoints" / "step-000003" / "digests.json").write_text("{")
    assert sparkctl(["merge", "r1"]) == 1
    assert capsys.readouterr().err == (
        "error: `r1/checkpoints/step-000003/digests.json` is missing or broken\n"
        "hint: sparkctl resume r1 --from step-000006\n"
    )


@pytest.mark.parametrize(
    ("before", "hint"),
    [
        (_nothing, "sparkctl train r1"),
        (_without_held_out, "sparkctl analyze DATA --run runs/r2 --eval-fraction 0.3 --force"),
    ],
)
def test_a_parent_is_named_from_the_working_folder(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said,
    before: Callable[[Run], None], hint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    parent = ready.run(Path("r1"), llama_folder, count=12, max_steps=3)
    run = ready.run(Path("runs/r2"), llama_folder, count=12, max_steps=3, parent=parent)
    if before is _without_held_out:
        assert sparkctl(["train", "r1"]) == 0
    before(run)
    capsys.readouterr()
    assert sparkctl(["train", "runs/r2", "--gate", "0.02"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == f"hint: {hint}"
    assert str(tmp_path) not in said


def test_a_run_in_the_working_folder_has_its_name(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    (tmp_path / "support").mkdir()
    monkeypatch.chdir(tmp_path / "support")
    run = ready.run(Path("."), llama_folder, count=12, max_steps=3)
    assert (run.manifest.run.name, run.manifest.run.folder) == ("support", str(tmp_path / "support"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert sparkctl(["train", "support", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "support"
