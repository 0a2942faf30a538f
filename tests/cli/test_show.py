"""`sparkctl show`: each step's state with the command that mends it, the lineage, and single values."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import merging_run
import pytest
import ready
from showing import Say, hint, states

from sparkctl.manifest.store import Run
from sparkctl.steps.show import next_command, show


@pytest.fixture
def trained(tmp_path: Path, llama_folder: Path, say: Say) -> Run:
    run = ready.run(tmp_path / "r1", llama_folder, count=12, max_steps=3)
    say("train", run.root)
    return Run.open(run.root)


def test_a_new_run(tmp_path: Path, say: Say) -> None:
    run = Run.create(tmp_path / "r1")
    assert set(states(say, run).values()) == {"not run"}
    assert hint(say, run, "analyze").startswith("sparkctl analyze DATA")


def test_hints_hold_for_a_folder_with_blanks(tmp_path: Path, llama_folder: Path, say: Say) -> None:
    """Copied into a shell, a hint names the run as one word."""
    run = ready.run(tmp_path / "my run", llama_folder, count=12, max_steps=3)
    hints = [hint(say, run, "train")]
    hints += [say(step, run.root, status=2).partition("hint: ")[2] for step in ("merge", "resume")]
    assert all(str(run.root) in shlex.split(text) for text in hints), hints
    new = Run.create(tmp_path / "new run")
    assert str(new.root) in shlex.split(hint(say, new, "analyze"))
    assert str(new.root) in shlex.split(say("train", new.root, status=2).partition("hint: ")[2])


def test_states_follow_the_run(trained: Run, say: Say) -> None:
    done = {"analyze": "done", "recommend": "done", "train": "done", "merge": "not run"}
    assert states(say, trained) == done
    with trained.step("resume"):
        assert states(say, trained) == {**done, "train": "running"}
    with trained.edit() as manifest:
        assert manifest.train
        manifest.train.status = "running"
    assert states(say, trained)["train"] == "stopped"
    assert "killed" in say("show", trained.root)
    assert hint(say, trained, "train") == f"sparkctl resume {trained.root}"
    with trained.edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate *= 2
    assert states(say, trained)["train"] == "stale"
    with trained.edit() as manifest:
        assert manifest.plan
        manifest.plan.made_from = "another analysis"
    shutil.rmtree(trained.root / "tokens")
    assert states(say, trained)["analyze"] == "stale"


def test_what_runs_is_neither_interrupted_nor_stale(trained: Run, say: Say) -> None:
    with trained.edit() as manifest:
        assert manifest.train
        manifest.train.status = "interrupted"
    assert "interrupted" in say("show", trained.root)
    with trained.step("resume"):
        said = say("show", trained.root)
    assert "running" in said
    assert "interrupted" not in said


def test_a_training_is_told_by_its_steps(trained: Run, say: Say) -> None:
    assert "over the last 2\n" in say("train", trained.root)
    with trained.edit() as manifest:
        assert manifest.train
        manifest.train.status = "interrupted"
    said = say("resume", trained.root, "--dry-run").splitlines()
    assert said[0] == "would go on from step-000002 (dry run: nothing written)"


def test_checkpoints_that_are_gone_are_marked(tmp_path: Path, qwen35_folder: Path, say: Say) -> None:
    run = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    say("merge", run.root)
    assert "(not there)" not in say("show", run.root)
    shutil.rmtree(run.root / "checkpoints")
    said = say("show", run.root).splitlines()
    assert [line for line in said if "best" in line and line.endswith("best (not there)")]
    assert [line for line in said if line.startswith("merge") and "(not there) → " in line]


def test_paths_open_from_the_working_folder(
    tmp_path: Path, qwen35_folder: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merging_run.trained_run(tmp_path / "runs" / "r1", qwen35_folder)
    say("merge", run.root)
    monkeypatch.chdir(tmp_path)
    said = say("show", "runs/r1")
    assert " runs/r1/checkpoints/step-000003" in said
    assert "→ runs/r1/merged" in said
    assert Path("runs/r1/checkpoints/step-000003").is_dir()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_mount_that_cannot_be_written_is_shown(
    trained: Run, say: Say, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opened = os.open

    def refuse(path: str | Path, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(trained.root)):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    assert states(say, trained)["train"] == "done"


def test_a_step_is_not_offered_before_the_one_that_it_needs(tmp_path: Path, llama_folder: Path, say: Say) -> None:
    run = ready.run(tmp_path / "my run", llama_folder, count=12, max_steps=3)
    named = shlex.quote(str(run.root))
    with run.edit() as manifest:
        plan, manifest.plan = manifest.plan, None
    offered = {step.name: step.mend for step in show(run.root).steps}
    assert offered == {"analyze": None, "recommend": f"sparkctl recommend {named}", "train": None, "merge": None}
    with run.edit() as manifest:
        manifest.plan = plan
    assert f"\nnext: sparkctl merge {named}\n" in say("train", run.root)
    with run.edit() as manifest:
        assert manifest.train
        manifest.train.status = "interrupted"
    assert next_command(run.root) == f"sparkctl resume {named}"
    assert "next" not in say("resume", run.root, "--dry-run")
    assert f"\nnext: sparkctl merge {named}\n" in say("resume", run.root)
    assert "next: " not in say("merge", run.root)  # the model has no head: the folder is there to be served
    assert next_command(run.root) is None


LINKS = ["r2 ", "step-000003", "merged-000003"]  # each the child of the one before it


def test_the_tree_goes_from_the_first_round_to_this_one(tmp_path: Path, qwen35_folder: Path, say: Say) -> None:
    first = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    second = merging_run.trained_run(tmp_path / "r2", qwen35_folder, parent=first)
    say("merge", second.root)
    said = say("show", second.root)
    tree = said[said.index("r1 ") :]
    assert tree.index("r1 ") < tree.index("step-000003") < tree.index("r2 ") < tree.index("merged-000003")
    assert "best" in tree
    assert [entry["name"] for entry in json.loads(say("show", second.root, "--json"))["lineage"]] == ["r2", "r1"]
    with second.edit() as manifest:  # as a merge leaves them that was done again
        manifest.checkpoints = manifest.checkpoints[::-1]
    tree = say("show", second.root).partition("\nnext: ")[0]
    at = {name: line.index(name) for line in tree.splitlines() for name in LINKS if name in line}
    assert sorted(LINKS, key=at.__getitem__) == LINKS
    assert len(set(at.values())) == len(LINKS)
    shutil.rmtree(first.root)
    assert "(not there)" in say("show", second.root)


def test_one_value_for_a_script(trained: Run, say: Say) -> None:
    assert say("show", trained.root, "--get", "plan.pack_length") == "64\n"
    assert say("show", trained.root, "--get", "plan.mode") == "lora\n"
    assert say("show", trained.root, "--get", "plan.checkpointing") == "false\n"
    assert say("show", trained.root, "--get", "resumes") == "[]\n"
    assert json.loads(say("show", trained.root, "--get", "plan.lora")) == {"r": 4, "alpha": 6}
    assert say("show", trained.root, "--get", "checkpoints.0.id") == "base\n"
    assert json.loads(say("show", trained.root, "--get", "schema", "--json")) == {
        "ok": True, "key": "schema", "value": 1,
    }  # fmt: skip


@pytest.mark.parametrize("key", ["plan.pack", "nothing", "plan.mode.x", "checkpoints.9.id", "", "plan."])
def test_a_key_that_is_not_there_names_those_that_are(trained: Run, say: Say, key: str) -> None:
    said = say("show", trained.root, "--get", key, status=2)
    assert "error: no `" in said
    assert "hint: sparkctl show" in said


def test_no_run(tmp_path: Path, say: Say) -> None:
    assert "is not a run" in say("show", tmp_path, status=2)
    (tmp_path / "run.toml").write_text("schema = 9")
    assert "schema 9" in say("show", tmp_path, status=2)
