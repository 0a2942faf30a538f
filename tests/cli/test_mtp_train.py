"""`sparkctl mtp train` from the command line: what is left, what is measured, interruptions, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import merging_run
import numpy as np
import pytest
import ready
from damaging import flip
from safetensors.torch import load_file
from two_ranks import two_ranks
from untimed import untimed

from sparkctl.cli.app import run as sparkctl
from sparkctl.errors import Interrupted
from sparkctl.files import sha256_file
from sparkctl.manifest.store import Run
from sparkctl.mtp.answers import Answer, greedy_answers
from sparkctl.mtp.drafter import read_head
from sparkctl.mtp.engine import HeadEngine
from sparkctl.steps import mtp_train
from sparkctl.train.metrics import read

Said = pytest.CaptureFixture[str]
FEW = ("--prompts", "3", "--pack-length", "64", "--epochs", "2", "--learning-rate", "0.01")


@pytest.fixture
def run(qwen35_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A merged run with held-out documents, no head trained yet."""
    monkeypatch.chdir(tmp_path)
    return merged_run(tmp_path / "r1", qwen35_folder)


def merged_run(root: Path, model: Path) -> Run:
    made = merging_run.trained_run(root, model)
    ready.store(made.root / "tokens", ready.documents(40))
    assert sparkctl(["merge", str(root), "--json"]) == 0
    return Run.open(made.root)


def answer(said: Said, *arguments: str, few: tuple[str, ...] = FEW) -> dict[str, Any]:
    said.readouterr()
    assert sparkctl(["mtp", "train", "r1", *few, *arguments, "--json"]) == 0
    return json.loads(said.readouterr().out)


def refused(said: Said, *arguments: str, status: int = 2) -> str:
    said.readouterr()
    assert sparkctl(["mtp", "train", "r1", *FEW, *arguments]) == status
    text = said.readouterr().err
    assert "error: " in text
    assert "Traceback" not in text
    return text


def test_a_head_is_trained_measured_and_left_in_the_run(run: Run, capsys: Said, qwen35_folder: Path) -> None:
    merged = {path.name: sha256_file(path) for path in (run.root / "merged").iterdir()}
    said = answer(capsys)
    table, manifest = said["mtp"], Run.open(run.root).manifest
    assert table["train"]["status"] == "done"
    assert table["train"]["steps"] == 6
    assert table["train"]["best_eval_loss"] < table["train"]["first_eval_loss"]
    assert [row["name"].split(" on ")[1] for row in table["acceptance"]][:2] == ["base", "tuned"]
    assert manifest.mtp.model_dump(mode="json") == table
    assert sha256_file(run.root / table["head"]) == table["digest"]
    shipped, left = read_head(qwen35_folder), load_file(run.root / table["head"])
    assert {n: (t.shape, t.dtype) for n, t in left.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    assert len([line for line in read(run.root / "mtp" / "metrics.jsonl") if "loss" in line]) == 6
    heads = [c for c in manifest.checkpoints if c.kind == "mtp-head"]
    assert [c.parent for c in heads] == ["merged-000003"] * len(heads)
    assert {path.name: sha256_file(path) for path in (run.root / "merged").iterdir()} == merged
    assert answer(capsys)["up_to_date"]
    assert answer(capsys, "--dry-run")["up_to_date"]
    assert sparkctl(["mtp", "train", "r1", *FEW]) == 0
    text = capsys.readouterr().out
    assert "mtp train (up to date: nothing was done, this is the result of 20" in text
    assert "Accepted drafts, over 3 held-out prompts" in text


def test_where_training_does_not_help_the_shipped_head_stays(run: Run, capsys: Said, qwen35_folder: Path) -> None:
    said = answer(capsys, few=("--prompts", "3", "--max-steps", "1", "--learning-rate", "1e-12"))
    assert said["mtp"]["mode"] == "shipped"
    assert "training did not help: the base's head is kept" in said["notes"]
    left = load_file(run.root / said["mtp"]["head"])
    assert all(left[name].equal(value) for name, value in read_head(qwen35_folder).items())


def test_where_acceptance_is_a_tie_the_held_out_loss_decides(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch, qwen35_folder: Path
) -> None:
    monkeypatch.setattr("sparkctl.mtp.accept.compared", lambda _, guesses_NG: np.ones_like(guesses_NG, dtype=bool))
    said = answer(capsys)
    train = said["mtp"]["train"]
    assert len({row["mean_accepted"] for row in said["mtp"]["acceptance"][1:]}) == 1
    assert said["mtp"]["mode"] == "trained"
    fell = f"fell from {train['first_eval_loss']:.4g} to {train['best_eval_loss']:.4g}"
    assert any(fell in note for note in said["notes"])
    left = load_file(run.root / said["mtp"]["head"])
    assert not all(left[name].equal(value) for name, value in read_head(qwen35_folder).items())


def test_answers_of_one_token_tell_nothing(run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*arguments: Any, **named: Any) -> list[Answer]:
        return [replace(a, ids=a.ids[:1]) for a in greedy_answers(*arguments, **named)]

    monkeypatch.setattr("sparkctl.mtp.accept.greedy_answers", short)
    said = answer(capsys)
    assert [row["drafts"] for row in said["mtp"]["acceptance"]] == [0, 0, 0]
    assert said["mtp"]["mode"] == "trained"
    assert any("nothing tells whether training helped" in note for note in said["notes"])


def test_interrupted_and_called_again_it_is_as_uninterrupted(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(run.root, tmp_path / "straight")
    assert sparkctl(["mtp", "train", "straight", *FEW]) == 0
    micro_step, calls = HeadEngine.micro_step, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise Interrupted("stopped", "again", 15)
        return micro_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HeadEngine, "micro_step", stopped)
        assert refused(capsys, status=143)
    assert Run.open(run.root).manifest.mtp.train.status == "interrupted"
    step = Run.open(run.root).manifest.mtp.train.step
    assert 0 < step < 6
    table = answer(capsys)["mtp"]
    assert [(r["step"], r["reason"]) for r in table["resumes"]] == [(step, "interrupted")]
    straight = tmp_path / "straight"
    for name in ("head.safetensors", "checkpoints/step-000006/trainable.safetensors"):
        assert (run.root / "mtp" / name).read_bytes() == (straight / "mtp" / name).read_bytes()
    assert lines(run.root) == lines(straight)


def lines(root: Path) -> list[dict[str, Any]]:
    return untimed(root / "mtp" / "metrics.jsonl")


def test_killed_between_training_and_measuring_only_that_is_done(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparkctl.steps.mtp_eval.measure", killed)
        assert sparkctl(["mtp", "train", "r1", *FEW, "--force"]) == 130
    hint = capsys.readouterr().err.rpartition("hint: ")[2].split()
    assert hint == ["sparkctl", "mtp", "train", "r1", *hint[4:]]
    assert "--force" not in hint
    assert Run.open(run.root).manifest.mtp.mode == "training"
    monkeypatch.setattr(HeadEngine, "micro_step", killed)
    assert sparkctl(hint[1:]) == 0
    assert Run.open(run.root).manifest.mtp.mode in ("trained", "shipped")


@pytest.mark.parametrize("amiss", ["flipped", "gone"])
def test_a_best_head_that_is_not_whole_is_not_what_is_left(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch, amiss: str
) -> None:
    """It was the best when the training ended; the last one, which is whole, stands in for it and is measured."""
    losses = {0: 3.0, 2: 2.5, 4: 1.0, 6: 2.0}
    monkeypatch.setattr("sparkctl.train.loop.held_out_loss", lambda *given: losses[int(given[-1].split()[-1])])
    answer(capsys)
    checkpoints = run.root / "mtp" / "checkpoints"
    best = checkpoints / "step-000004"
    assert Run.open(run.root).manifest.mtp.train.best_checkpoint == best.name
    (run.root / "mtp" / "head.safetensors").unlink()
    if amiss == "flipped":
        flip(best / "trainable.safetensors")
    else:
        shutil.rmtree(best)
    monkeypatch.setattr(mtp_train, "_measured", lambda *given: ([], []))  # so that the trained head is kept
    assert sparkctl(["mtp", "train", "r1", *FEW]) == 0
    assert "the best checkpoint is step-000006 now" in capsys.readouterr().err
    table = Run.open(run.root).manifest.mtp
    assert (table.train.best_checkpoint, table.train.best_eval_loss) == ("step-000006", 2.0)
    trained = load_file(checkpoints / "step-000006" / "trainable.safetensors")
    left = load_file(run.root / "mtp" / "head.safetensors")
    assert trained.keys() == left.keys()
    assert all(left[name].equal(value.to(left[name].dtype)) for name, value in trained.items())


def test_the_hint_of_an_interrupted_training_goes_on_with_it(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of `mtp inject`, which knows the options by the plan alone; a bare `mtp train` takes them too."""
    micro_step, calls = HeadEngine.micro_step, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise Interrupted("stopped", "again", 15)
        return micro_step(*arguments)

    others = ("--steps", "2", "--loss", "ce", "--learning-rate", "0.0003", "--pack-length", "48", "--max-steps", "6")
    with monkeypatch.context() as patch:
        patch.setattr(HeadEngine, "micro_step", stopped)
        assert sparkctl(["mtp", "train", "r1", *others]) == 143
    capsys.readouterr()
    assert sparkctl(["mtp", "inject", "r1", "--mode", "trained"]) == 2
    hint = capsys.readouterr().err.partition("hint: `")[2].partition("` trains one; `--mode default`")[0]
    for options in ("--steps 2", "--loss ce", "--pack-length 48", "--max-steps 6"):
        assert options in hint
    assert sparkctl(["mtp", "train", "r1", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["learning_rate"] == 0.0003
    assert sparkctl([*hint.split()[1:], "--prompts", "4"]) == 0
    table = Run.open(run.root).manifest.mtp
    assert table
    assert (table.mode in ("trained", "shipped"), len(table.resumes)) == (True, 1)
    (run.root / "mtp" / "head.safetensors").unlink()
    capsys.readouterr()
    assert sparkctl(["mtp", "inject", "r1", "--mode", "trained"]) == 1
    assert f"hint: {hint} --force\n" in capsys.readouterr().err


def test_few_steps_are_not_expected_to_take_as_long_as_all(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for asked in ((), ("--max-steps", "1000000"), ("--max-steps", "1")):
        assert sparkctl(["mtp", "train", "r1", *asked, "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        seconds.append(plan["estimated_seconds"] - plan["estimated_start_seconds"])
    assert seconds[0] == seconds[1] > seconds[2] > 0


def test_under_torchrun_the_ranks_share_a_step_and_the_first_writes(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "alone")
    four = [*FEW, "--max-steps", "4"]
    assert sparkctl(["mtp", "train", "alone", *four]) == 0
    two_ranks(_rank, four, str(tmp_path))
    assert [(tmp_path / f"{rank}.out").read_text().count('"ok": true') for rank in (0, 1)] == [1, 0]
    table, alone = (Run.open(root).manifest.mtp for root in (run.root, tmp_path / "alone"))
    assert (table.train.status, table.train.step) == ("done", 4)
    assert table.mode == alone.mode
    assert len(lines(run.root)) == len(lines(tmp_path / "alone"))
    for mine, theirs in zip(lines(run.root), lines(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # the order of sums; observed none
    last = "mtp/checkpoints/step-000004/trainable.safetensors"
    together, by_itself = load_file(run.root / last), load_file(tmp_path / "alone" / last)
    assert together.keys() == by_itself.keys()
    apart = max(float((together[name] - tensor).abs().max()) for name, tensor in by_itself.items())
    assert apart < 1e-4  # observed 4e-6; the steps moved weights by .03, of which 1 % is 3e-4


def _rank(rank: int, few: list[str], folder: str) -> None:
    with open(f"{folder}/{rank}.out", "w") as sys.stdout:
        assert sparkctl(["mtp", "train", "r1", *few, "--json"]) == 0


@pytest.mark.parametrize("what", ["checkpoint", "head"])
def test_a_full_disk_while_training(
    run: Run, small_disk: Path, qwen35_folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The disk fills up; later, with space again, the same command goes on as if nothing had been."""
    straight, filler = answer(capsys)["mtp"], small_disk / "filler"
    full = merged_run(small_disk / "r1", qwen35_folder)
    monkeypatch.chdir(small_disk)
    owner, name = (HeadEngine, "micro_step") if what == "checkpoint" else (mtp_train, "_write")
    original, calls = getattr(owner, name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (12 if what == "checkpoint" else 1):
            filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20_480))  # lines and a manifest still fit
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        text = refused(capsys, status=1)
    place = "checkpoints/step-000004" if what == "checkpoint" else "head.safetensors"
    assert f"error: no space left on device at `r1/mtp/{place}`" in text
    assert "hint: free some space" in text
    mtp = full.root / "mtp"
    assert [path for path in mtp.rglob("*") if path.name.startswith(".")] == []
    assert not (mtp / "head.safetensors").exists()
    table = Run.open(full.root).manifest.mtp
    assert (table.mode, table.head) == ("training", None)
    assert (table.train.status == "done") == (what == "head")
    filler.unlink()
    again = answer(capsys)["mtp"]
    assert again["digest"] == straight["digest"]
    assert lines(full.root) == lines(run.root)


def test_another_plan_or_another_model_begins_anew_only_when_forced(run: Run, capsys: Said) -> None:
    first = answer(capsys)["mtp"]
    kept = "error: `r1` has a head that was trained with other flags: bare, `sparkctl mtp train r1` keeps it\n"
    assert kept in refused(capsys, "--loss", "ce")
    capsys.readouterr()
    assert sparkctl(["mtp", "train", "r1", "--json"]) == 0  # bare, it means the one that there is
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True
    assert Run.open(run.root).manifest.mtp.model_dump(mode="json") == first
    other = answer(capsys, "--loss", "ce", "--force")["mtp"]
    assert (other["plan"]["loss"], other["resumes"]) == ("ce", [])
    assert other["train"]["final_loss"] != first["train"]["final_loss"]
    assert sparkctl(["merge", "r1", "--checkpoint", "last", "--force"]) == 0
    assert "error: `r1` has a head that was trained for another merged model\n" in refused(capsys, "--loss", "ce")
    assert sparkctl(["mtp", "train", "r1"]) == 2  # bare, as it was trained before
    anew = (
        "hint: `sparkctl mtp train r1 --loss ce --pack-length 64 --epochs 2 --learning-rate 0.01 --force` begins anew\n"
    )
    assert anew in capsys.readouterr().err


def test_a_dry_run_writes_nothing(run: Run, capsys: Said) -> None:
    before = sorted(run.root.rglob("*"))
    plan = answer(capsys, "--dry-run")["plan"]
    assert (plan["steps"], plan["pack_length"], plan["draft_steps"], plan["loss"]) == (6, 64, 3, "kl")
    assert sorted(run.root.rglob("*")) == before
    assert Run.open(run.root).manifest.mtp is None


def test_without_a_merged_model(run: Run, capsys: Said) -> None:
    with run.edit() as manifest:
        manifest.merge = None
    assert "hint: sparkctl merge r1" in refused(capsys)


def test_tokens_that_are_not_the_analysed_ones(run: Run, capsys: Said) -> None:
    with run.edit() as manifest:
        manifest.analysis.digest = "another"
    text = refused(capsys)
    assert "is not what `analyze` wrote" in text
    assert "hint: sparkctl analyze" in text


@pytest.mark.parametrize("rate", ["0", "inf"])
def test_a_rate_of_nothing(run: Run, capsys: Said, rate: str) -> None:
    said = refused(capsys, "--learning-rate", rate)
    assert f"error: a learning rate of {rate} trains nothing\n" in said
    assert "hint: sparkctl mtp train r1 --pack-length 64 --epochs 2 --learning-rate 0.0001 --prompts 3\n" in said


def test_a_merged_model_that_was_changed(run: Run, capsys: Said) -> None:
    (run.root / "merged" / "config.json").write_text("{}")
    assert "hint: sparkctl merge r1 --force" in refused(capsys)


def test_a_model_without_a_head_is_skipped(llama_folder: Path, tmp_path: Path, capsys: Said) -> None:
    made = merging_run.trained_run(tmp_path / "r2", llama_folder)
    ready.store(made.root / "tokens", ready.documents(20))
    assert sparkctl(["merge", str(made.root), "--json"]) == 0
    capsys.readouterr()
    assert sparkctl(["mtp", "train", str(made.root), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "llama" in said["skipped"]
    assert Run.open(made.root).manifest.mtp.mode == "skipped"
    assert sparkctl(["mtp", "train", str(made.root)]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_fresh_head_for_a_base_that_lost_its_own(run: Run, capsys: Said, qwen35_folder: Path, tmp_path: Path) -> None:
    said = answer(capsys, "--fresh")
    assert said["plan"]["fresh"]
    first = next(line for line in read(run.root / "mtp" / "metrics.jsonl") if "eval_loss" in line)
    assert first["eval_loss"] > 0


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_base_whose_config_leaves_out_a_size(command: str, run: Run, capsys: Said) -> None:
    """The type's default stands for it, as everywhere: here it is not the weights', which is an error and no bug."""
    assert run.manifest.model
    base = run.resolve(run.manifest.model.source)
    path = Path(shutil.copytree(base, run.root / "base")) / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["head_dim"]
    path.write_text(json.dumps(config))
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.source, manifest.model.config_sha256 = "base", sha256_file(path)
    assert sparkctl(["mtp", command, str(run.root), "--dry-run"]) == 1
    assert "for [1024, 32]" in capsys.readouterr().err
