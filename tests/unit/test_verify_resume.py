"""`verify resume` in one process: a training that draws lots is caught, and nothing of the run is touched."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from safetensors.torch import save_file

from sparkctl.data.tokens import TokenStore
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.store import Run
from sparkctl.steps import killing, verify_resume
from sparkctl.steps.killing import Killer, killed_training
from sparkctl.steps.resume import resume
from sparkctl.steps.train import train
from sparkctl.train import session, state
from sparkctl.train.engines.native.engine import NativeEngine
from sparkctl.verify.resume import differences


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    return ready.run(tmp_path / "run", llama_folder, count=24, engine="native")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings run in this process, and die of an exception."""

    def launch(command: str, root: Path, *options: str, hint: str, slow: bool = False) -> None:
        train(root, certificate=False) if command == "train" else resume(root)

    def kill(*_: object) -> None:
        raise Killed

    def killed(root: Path, after: int, *, allow_slow: bool = False) -> int:
        plan = Run.open(root).manifest.plan
        assert plan
        with pytest.raises(Killed):
            train(root, progress=Killer(plan.save_every + after), certificate=False)
        return killing.last_step(root)

    monkeypatch.setattr(verify_resume, "launch", launch)
    monkeypatch.setattr(verify_resume, "killed_training", killed)
    monkeypatch.setattr(killing.os, "kill", kill)


def contents(root: Path) -> dict[str, bytes]:
    """What a run's folder holds, but for the file that says which step works in it."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".step.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_resumed_training_is_the_straight_one(run: Run, here: None) -> None:
    before = contents(run.root)
    made = verify_resume.verify_resume(run.root)
    assert made.differences == []
    assert (made.steps, made.killed_at, made.resumed_from) == (4, 3, 2)
    after = contents(run.root)
    assert {name for name in after if not name.startswith(".")} == {n for n in before if not n.startswith(".")}
    assert all(after[name] == before[name] for name in before)


def test_a_training_that_draws_lots_is_caught(run: Run, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NativeEngine.micro_step
    lots = torch.Generator().manual_seed(0)  # goes on over all trainings of this process

    def micro_step(self: Any, pack: Any, scale: float) -> torch.Tensor:
        loss = original(self, pack, scale)
        gradient = next(iter(self.parameters().values())).grad
        gradient += 1e-4 * torch.randn(gradient.shape, generator=lots)
        return loss

    monkeypatch.setattr(NativeEngine, "micro_step", micro_step)
    found = verify_resume.verify_resume(run.root).differences
    assert found[0].startswith("metrics.jsonl: step 1: grad_norm ")
    assert any(one.startswith("trainable.safetensors: `") and "of its norm" in one for one in found)
    assert any(one.startswith("optimizer.safetensors: `exp_avg.") for one in found)


def test_a_resume_that_begins_anew_is_caught(run: Run, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes come of it: that no checkpoint was read has to be seen."""
    monkeypatch.setattr(state, "newest_complete", lambda _: (None, []))
    made = verify_resume.verify_resume(run.root)
    assert made.resumed_from == 0
    assert made.differences == ["resumed from step 0; the checkpoint is of step 2"]


def test_scratch_folders_of_killed_proofs_are_swept(run: Run, here: None) -> None:
    old = run.root / ".verify-resume.abc.tmp"
    old.mkdir()
    verify_resume.verify_resume(run.root)
    assert not old.exists()


def test_a_plan_too_short_to_be_killed_in_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "run", llama_folder, steps=3)
    with pytest.raises(UsageError, match="is trained in 3 steps"):
        verify_resume.verify_resume(run.root)


def test_a_training_that_fails_says_why(run: Run) -> None:
    """In processes of their own: what the command said is in the message."""
    shutil.rmtree(run.root / "tokens")
    with pytest.raises(SparkError, match=r"`sparkctl train` ended with status 2:\n(.|\n)*tokens"):
        verify_resume.launch("train", run.root, hint="again")
    with pytest.raises(SparkError, match=r"before it could be killed:\n(.|\n)*tokens"):
        killed_training(run.root, 1)


def test_what_is_missing_is_a_difference(tmp_path: Path) -> None:
    assert differences(tmp_path / "a", tmp_path / "b", 4) == ["`step-000004` is missing"] * 2


def test_a_line_or_a_number_that_one_lacks_is_a_difference(tmp_path: Path) -> None:
    for name in "ab":
        folder = tmp_path / name / "checkpoints" / "step-000002"
        folder.mkdir(parents=True)
        for file in (state.TRAINABLE, state.OPTIMIZER):
            (folder / file).write_bytes(b"the same")
    first, last = {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "seconds": 1.0}
    (tmp_path / "a" / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
    for lines, count in (
        ([first, last | {"seconds": 2.0}], 0), ([first], 2), ([first, {"step": 2}], 1),
        ([first, last | {"grad_norm": 1.0}], 1), ([first, last, {"step": 2, "eval_loss": 1.0}], 2),
    ):  # fmt: skip
        (tmp_path / "b" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert len(differences(tmp_path / "a", tmp_path / "b", 2)) == count, lines


@pytest.mark.parametrize(
    ("theirs", "metadata", "found"),
    [
        ([1.0, -0.0], None, "trainable.safetensors: `x` differs by 4.9e-324 of its norm"),
        ([1.0, math.nan], None, "trainable.safetensors: `x` differs by inf of its norm"),
        ([1.0, 0.0], {"format": "pt"}, "trainable.safetensors: other bytes around its tensors"),
    ],
)
def test_bytes_that_no_number_tells_of_are_a_difference(
    tmp_path: Path, theirs: list[float], metadata: dict[str, str] | None, found: str
) -> None:
    for name, values, about in (("a", [1.0, 0.0], None), ("b", theirs, metadata)):
        folder = tmp_path / name / "checkpoints" / "step-000002"
        folder.mkdir(parents=True)
        save_file({"x": torch.tensor(values)}, folder / state.TRAINABLE, about)
        (folder / state.OPTIMIZER).write_bytes(b"the same")
    assert differences(tmp_path / "a", tmp_path / "b", 2) == [found]


@pytest.mark.parametrize("draws", [0, 3])
def test_what_libraries_draw_while_an_engine_is_made_is_forgotten(
    run: Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    """rich draws a number from Python's generator when it is first imported: in one process before, in one after."""
    real = session.make_engine

    def make_engine(*arguments: Any) -> Any:
        for _ in range(draws):
            random.random()
        return real(*arguments)

    monkeypatch.setattr(session, "make_engine", make_engine)
    plan = run.manifest.plan
    assert plan
    session.Session.open(plan, llama_folder, TokenStore.open(run.root / "tokens"))
    drawn = random.random()
    assert drawn == random.Random(plan.seed).random()
