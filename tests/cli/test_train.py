"""`train` and `resume` as commands: what they refuse, what they say, and that nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from striking import at_step
from untimed import untimed

from sparkctl.cli import app
from sparkctl.manifest.store import Run
from sparkctl.train import state
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.metrics import Metrics

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = app.run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, *said

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    """A finished training. Read only."""
    from sparkctl.steps.train import train

    run = ready.run(tmp_path_factory.mktemp("straight") / "run", llama_folder, count=24)
    train(run.root)
    return Run.open(run.root)


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """The same training, not begun."""
    return ready.run(tmp_path / "run", llama_folder, count=24)


def lines(run: Run) -> list[dict[str, Any]]:
    return untimed(run.root / "metrics.jsonl")


def weights(run: Run) -> bytes:
    trained = Run.open(run.root).manifest.train
    assert trained
    return (run.root / "checkpoints" / str(trained.last_checkpoint) / "trainable.safetensors").read_bytes()


def test_a_training_and_what_the_manifest_says_of_it(say: Say, run: Run, straight: Run) -> None:
    status, out, err = say("train", run.root, "--json")
    assert status == 0, err
    answer = json.loads(out)
    table = Run.open(run.root).manifest.train
    assert table
    assert answer["train"] == table.model_dump(mode="json")
    assert (table.status, table.step, table.steps, table.engine) == ("done", 4, 4, "reference")
    assert table.versions["torch"] == torch.__version__
    assert int(table.choices["threads"]) == torch.get_num_threads()
    assert table.trainable_parameters == sum(p.numel() for p in _tensors(run).values())
    found = lines(run)
    assert table.first_loss == found[1]["loss"]
    assert table.final_eval_loss == found[-1]["eval_loss"]
    assert table.best_eval_loss == min(line["eval_loss"] for line in found[1:] if "eval_loss" in line)
    assert table.tokens == sum(line.get("tokens", 0) for line in found)
    assert table.peak_memory
    assert table.estimated_seconds == 10 - 4  # without loading and rehearsal, as `seconds`
    assert [(c.id, c.kind, c.step, c.parent) for c in Run.open(run.root).manifest.checkpoints] == [
        ("base", "base", None, None), ("step-000003", "step", 3, "base"), ("step-000004", "step", 4, "base"),
    ]  # fmt: skip
    assert found == lines(straight)
    assert weights(run) == weights(straight)
    assert "held-out loss" in err


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.root / "checkpoints" / "step-000004" / "trainable.safetensors")


def test_a_finished_one_is_up_to_date(say: Say, straight: Run) -> None:
    before = (straight.root / "run.toml").read_bytes()
    status, out, err = say("train", straight.root, "--json")
    assert (status, json.loads(out)["up_to_date"]) == (0, True)
    assert "up to date" in err
    status, out, err = say("resume", straight.root)
    assert status == 0
    assert "finished" in err
    assert "4 of 4" in out
    for command in (("resume",), ("resume", "--dry-run"), ("train",), ("train", "--dry-run")):
        title = say(command[0], straight.root, *command[1:])[1].splitlines()[0]
        assert title.startswith("trained (up to date: nothing was done, this is the result of 20"), command
    assert (straight.root / "run.toml").read_bytes() == before


def test_dry_run_writes_nothing(say: Say, run: Run) -> None:
    before = sorted(run.root.iterdir())
    status, out, _ = say("train", run.root, "--dry-run")
    assert status == 0
    assert "nothing written" in out
    assert {p.name for p in run.root.iterdir()} - {p.name for p in before} <= {".step.lock", ".step.json"}
    assert run.manifest == Run.open(run.root).manifest


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [("analysis", r"no \[analysis\]", "sparkctl analyze"), ("plan", r"no \[plan\]", "sparkctl recommend {root}")],
)
@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_step_run_before_the_one_it_needs(
    say: Say, run: Run, command: str, table: str, message: str, hint: str
) -> None:
    with run.edit() as manifest:
        setattr(manifest, table, None)
    status, _, err = say(command, run.root)
    assert status == 2
    assert re.search(f"error: {message}", err)
    assert f"hint: {hint.format(root=run.root)}" in err


def test_an_unstarted_one_names_train(say: Say, run: Run) -> None:
    status, _, err = say("resume", run.root)
    assert status == 2
    assert "has not been trained yet" in err
    assert f"hint: sparkctl train {run.root}" in err


def test_inputs_that_changed_are_named(say: Say, run: Run, tmp_path: Path, llama_folder: Path) -> None:
    digest = run.manifest.analysis.digest
    with run.edit() as manifest:
        manifest.analysis.made_from = "another"
    assert "made from another analysis" in say("train", run.root)[2]
    with run.edit() as manifest:
        manifest.analysis.made_from = "test"
        manifest.analysis.digest = "another"
    assert "is not what `analyze` wrote" in say("train", run.root)[2]
    other = Path(shutil.copytree(llama_folder, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with run.edit() as manifest:
        manifest.analysis.digest = digest
        manifest.model.source = "../other"
    status, _, err = say("train", run.root)
    assert status == 2
    assert "is not the one that `analyze` saw" in err
    assert not (run.root / "metrics.jsonl").exists()


def test_an_engine_that_is_not_there(say: Say, run: Run) -> None:
    with run.edit() as manifest:
        manifest.plan.engine = "unsloth"
    status, _, err = say("train", run.root)
    assert status == 2
    assert "unsloth is not installed" in err
    assert "hint: pip install" in err
    assert Run.open(run.root).manifest.train is None


def test_two_trainings_in_one_run(say: Say, run: Run) -> None:
    with run.step("train"):
        status, _, err = say("train", run.root)
    assert status == 1
    assert "`train` is running" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_then_resumed_is_as_uninterrupted(
    say: Say, run: Run, straight: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, ReferenceEngine, 7, lambda engine: signal.raise_signal(number))
        got, out, err = say("train", run.root, "--json")
    assert got == status
    assert json.loads(out)["exit_status"] == status
    assert f"hint: sparkctl resume {run.root}" in err
    stopped = Run.open(run.root).manifest
    assert stopped.train
    assert stopped.train.status == "interrupted"
    assert 0 < stopped.train.step < 4
    refused, _, err = say("train", run.root)
    assert refused == 2
    assert f"hint: sparkctl resume {run.root}" in err
    assert say("resume", run.root)[0] == 0
    manifest = Run.open(run.root).manifest
    assert [(r.step, r.reason) for r in manifest.resumes] == [(stopped.train.step, "interrupted")]
    assert manifest.train.status == "done"
    assert lines(run) == lines(straight)
    assert weights(run) == weights(straight)


def test_a_loss_that_is_no_number(say: Say, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = ReferenceEngine.micro_step, [0]

    def micro_step(self: ReferenceEngine, pack: Any, scale: float) -> torch.Tensor:
        calls[0] += 1
        return original(self, pack, scale) * (float("nan") if calls[0] == 14 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceEngine, "micro_step", micro_step)
        status, _, err = say("train", run.root)
    assert status == 1
    assert "loss of step" in err
    assert "chats.jsonl:" in err
    assert "--learning-rate" in err
    assert Run.open(run.root).manifest.train.status == "failed"
    assert say("resume", run.root)[0] == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    say: Say, tmp_path: Path, llama_folder: Path
) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, save_every=1, keep=3)
    assert say("train", run.root)[0] == 0
    wanted, bits = lines(run), weights(run)
    newest = run.root / "checkpoints" / "step-000004" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    with run.edit() as manifest:
        manifest.train.status = "running"
    status, _, err = say("resume", run.root)
    assert status == 0
    assert f"`{newest}` is damaged" in err
    assert "resuming from step-000003" in err
    assert lines(run) == wanted
    assert weights(run) == bits
    status, _, err = say("resume", run.root, "--from", "step-000002")
    assert status == 0
    assert [r.reason for r in Run.open(run.root).manifest.resumes] == ["killed", "--from step-000002"]
    assert lines(run) == wanted
    status, _, err = say("resume", run.root, "--from", "step-000009")
    assert status == 2
    assert "no checkpoint `step-000009`" in err
    assert "step-000004" in err


def test_another_plan_begins_anew_only_when_forced(say: Say, tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24)
    assert say("train", run.root)[0] == 0
    before = weights(run)
    with run.edit() as manifest:
        manifest.plan.learning_rate = 1e-3
    for command in ("train", "resume"):
        status, _, err = say(command, run.root)
        assert status == 2
        assert f"sparkctl train {run.root} --force" in err
    assert weights(run) == before
    assert say("train", run.root, "--force")[0] == 0
    assert weights(run) != before
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4]
    with run.edit() as manifest:
        manifest.plan.save_every = 2  # how it is saved, not what is learnt
    assert "up to date" in say("train", run.root)[2]


def test_a_round_that_continues_starts_from_the_parent_s_best(
    say: Say, straight: Run, tmp_path: Path, llama_folder: Path
) -> None:
    child = ready.run(tmp_path / "child", llama_folder, parent=straight, continues=True, count=24, learning_rate=1e-9)
    assert say("train", child.root)[0] == 0
    assert lines(child)[0]["eval_loss"] == straight.manifest.train.best_eval_loss
    base = ready.run(tmp_path / "base", llama_folder, parent=straight, count=24)
    assert say("train", base.root)[0] == 0
    assert lines(base)[0]["eval_loss"] == lines(straight)[0]["eval_loss"]
    entries = Run.open(child.root).manifest.checkpoints
    assert entries[-1].parent == f"{straight.manifest.run.id}:{straight.manifest.train.best_checkpoint}"


@pytest.mark.parametrize(
    ("changes", "named"), [({"lora": {"r": 8, "alpha": 4}}, "LoRA rank"), ({"mode": "full", "lora": None}, "mode")]
)
def test_a_round_cannot_continue_another_kind(
    say: Say, straight: Run, tmp_path: Path, llama_folder: Path, changes: dict, named: str
) -> None:
    child = ready.run(tmp_path / "child", llama_folder, parent=straight, continues=True, count=24, **changes)
    status, _, err = say("train", child.root)
    assert status == 2
    assert f"another {named}" in err


def test_the_gate(say: Say, straight: Run, tmp_path: Path, llama_folder: Path) -> None:
    best = straight.manifest.train.best_eval_loss
    better = ready.run(tmp_path / "better", llama_folder, parent=straight, continues=True, count=24)
    assert say("train", better.root, "--gate", "0.02")[0] == 0
    gate = Run.open(better.root).manifest.train.gate
    assert (gate.parent_loss, gate.limit, gate.passed) == (best, 0.02, True)
    worse = ready.run(tmp_path / "worse", llama_folder, parent=straight, count=24, learning_rate=1e-6)
    status, out, err = say("train", worse.root, "--gate", "0", "--json")
    assert status == 1
    assert "worse than the parent's" in json.loads(out)["error"]
    assert "the gate allows 0.0%" in err
    manifest = Run.open(worse.root).manifest
    assert (manifest.train.status, manifest.train.gate.passed) == ("done", False)
    assert manifest.train.gate.loss == manifest.train.best_eval_loss > best
    status, out, _ = say("train", worse.root)
    assert status == 0
    assert "worse by more than" in out
    status, _, err = say("train", worse.root, "--gate", "10")  # a finished one is only scored
    assert status == 0
    assert "up to date" in err
    assert Run.open(worse.root).manifest.train.gate.passed


def test_what_is_trained_already_is_found_without_torch(straight: Run) -> None:
    code = (
        "import sys; from sparkctl.cli import app; status = app.run(['train', sys.argv[1], '--no-certificate']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, straight.root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "manifest"])
def test_a_full_disk_while_training(
    say: Say, small_disk: Path, llama_folder: Path, straight: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The disk fills up at a step; later, with space again, the training goes on as if nothing had been."""
    run = ready.run(small_disk / "run", llama_folder, count=24)
    filler = small_disk / "filler"

    def fill() -> None:
        spare = 24_576 if what == "checkpoint" else 0  # a line and a manifest still fit
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - spare))

    def wrap(owner: Any, name: str, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            results = [original(*arguments, **named)] if after else []
            if not filler.exists():
                fill()
            return results[0] if after else original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    if what == "checkpoint":
        at_step(monkeypatch, ReferenceEngine, 3, lambda engine: fill())
    elif what == "metrics":
        wrap(Metrics, "write")
    else:
        wrap(state, "save", after=True)
    status, _, err = say("train", run.root)
    assert status == 1, err
    assert "error: no space left" in err
    assert ("metrics.jsonl" in err) == (what == "metrics")
    assert (run.root / "checkpoints" / "step-000003").exists() == (what == "manifest")
    again = f"`sparkctl resume {run.root}` goes on from step-000003" if what == "manifest" else "run the same command"
    assert f"hint: free some space there, then {again}" in err
    assert Run.open(run.root).manifest.train.status in ("running", "failed")
    assert [p.name for p in (run.root / "checkpoints").iterdir() if p.name.startswith(".")] == []
    filler.unlink()
    monkeypatch.undo()
    assert say("resume", run.root)[0] == 0
    assert (lines(run), weights(run)) == (lines(straight), weights(straight))
