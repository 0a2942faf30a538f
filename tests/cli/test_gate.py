"""A gate outlives the training that it was given to: an interruption and a resume, a merge, a look at the run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ready
import tiny
from safetensors.torch import load_file, save_file

from sparkctl.cli import app
from sparkctl.errors import Interrupted, UsageError
from sparkctl.manifest.schema import Lora
from sparkctl.manifest.store import Run
from sparkctl.steps import gate
from sparkctl.train import state
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.state import CheckpointDamaged


def test_an_interrupted_training_is_held_to_its_gate_when_resumed(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = ready.run(tmp_path / "r1", llama_folder, count=24)
    assert app.run(["train", str(parent.root)]) == 0
    base, other = shutil.copytree(llama_folder, tmp_path / "base"), dict(learning_rate=1e-6, lora=Lora(r=8, alpha=8))
    weights = {name: value * 1.1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    child = ready.run(tmp_path / "r2", base, parent=Run.open(parent.root), count=24, **other)
    calls = 0
    micro_step = ReferenceEngine.micro_step

    def stopped(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Interrupted("stopped", "resume", 2)
        return micro_step(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceEngine, "micro_step", stopped)
        assert app.run(["train", str(child.root), "--gate", "0"]) == 130
    assert Run.open(child.root).manifest.train.gate_limit == 0
    capsys.readouterr()
    assert app.run(["resume", str(child.root)]) == 1
    assert "the gate allows 0.0%" in capsys.readouterr().err
    trained = Run.open(child.root).manifest.train
    assert (trained.status, trained.gate.passed) == ("done", False)
    assert (
        trained.gate.parent_loss == Run.open(parent.root).manifest.train.best_eval_loss
    )  # on its own base, with its own rank
    assert app.run(["show", str(child.root), "--json"]) == 0
    assert "not let through by the gate" in json.loads(capsys.readouterr().out)["steps"]["train"]["detail"]


@pytest.mark.parametrize(("loss", "passed"), [(2.5, True), (2.51, False)])
def test_a_gate_is_a_share_of_the_parent_s_loss_for_the_best_one(
    loss: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_parent_loss", lambda *_: 2.0)
    trained = SimpleNamespace(best_eval_loss=loss, final_eval_loss=9.0)
    found = gate.score(None, (None, None), trained, 0.25, None, None)  # type: ignore[arg-type]
    assert (found.parent_loss, found.loss, found.passed) == (2.0, loss, passed)


def test_the_rival_is_the_parent_s_best_checkpoint_whole_and_comparable(tmp_path: Path, llama_folder: Path) -> None:
    parent = ready.run(tmp_path / "r1", llama_folder, count=24)
    assert app.run(["train", str(parent.root), "--no-certificate"]) == 0
    oldest, *newer = state.listed(parent.root / "checkpoints")
    assert newer
    with Run.open(parent.root).edit() as manifest:
        manifest.train.best_checkpoint = oldest.name
    child = ready.run(tmp_path / "r2", llama_folder, parent=Run.open(parent.root), count=24)
    assert gate.rival(child)[1].resolve() == oldest.resolve()
    with child.edit() as manifest:
        manifest.analysis.eval_examples = 0
    with pytest.raises(UsageError, match="holds no example out"):
        gate.rival(Run.open(child.root))
    with child.edit() as manifest:
        manifest.model.tokenizer_sha256 = "another"
    with pytest.raises(UsageError, match="another tokenizer"):
        gate.rival(Run.open(child.root))
    (oldest / "trainable.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match=oldest.name):
        gate.rival(child)


def test_a_gate_without_a_parent_is_refused_before_training(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ready.run(tmp_path / "r1", llama_folder, count=24).root
    assert app.run(["train", str(root), "--gate", "0.02"]) == 2
    assert "has no parent" in capsys.readouterr().err
    assert not (root / "metrics.jsonl").exists()


Answer = Callable[..., dict]
SMALL = ("--epochs", 1, "--lora-r", 8, "--lora-alpha", 8)  # a plan


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """What a command answers, as its JSON object."""

    def answer(*words: object) -> dict:
        capsys.readouterr()
        app.run([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)

    return answer


@pytest.mark.parametrize("option", ["--continue", "--gate"])
def test_what_the_parent_was_trained_on_measures_nothing(
    tmp_path: Path, llama_folder: Path, answer: Answer, option: str
) -> None:
    """A child that holds out more than its parent holds out what the parent has seen; its hint mends that."""

    data, r1, r2 = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1", tmp_path / "r2"
    train = ("train", r2, "--no-certificate", *(["--gate", "9"] if option == "--gate" else []))
    answer("analyze", data, "--run", r1, "--model", llama_folder, "--eval-fraction", 0.1)
    answer("recommend", r1, *SMALL)
    assert answer("train", r1, "--no-certificate")["ok"]
    more = ["--continue"] if option == "--continue" else []
    assert answer("analyze", data, "--run", r2, "--parent", r1, "--eval-fraction", 0.5, *more)["ok"]
    answer("recommend", r2, *SMALL)
    held_out = [Run.open(root).manifest.analysis.eval_examples for root in (r1, r2)]
    refused = answer(*train)
    assert refused["exit_status"] == 2
    assert f"was trained on {held_out[1] - held_out[0]} of the {held_out[1]} examples that" in refused["error"]
    assert answer(*shlex.split(refused["hint"])[1:])["analysis"]["eval_examples"] == held_out[0]
    answer("recommend", r2, *SMALL)
    assert answer(*train)["ok"]


def test_a_parent_that_held_nothing_out_cannot_be_a_rival_of_its_own_data(
    tmp_path: Path, llama_folder: Path, answer: Answer
) -> None:
    """Where the hint is followed nothing is left to measure: it says so, and does not send in a circle."""

    data, r1, r2 = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1", tmp_path / "r2"
    answer("analyze", data, "--run", r1, "--model", llama_folder, "--eval-fraction", 0)
    answer("recommend", r1, *SMALL)
    assert answer("train", r1, "--no-certificate")["ok"]
    assert answer("analyze", data, "--run", r2, "--parent", r1, "--eval-fraction", 0.5)["ok"]
    answer("recommend", r2, *SMALL)
    hint = answer("train", r2, "--no-certificate", "--gate", 9)["hint"]
    assert hint.endswith("--eval-fraction 0 --force` holds none out; then nothing is measured, and `--gate` has to go")
