"""`sparkctl show`: each step's state with the command that mends it, the lineage, and single values."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merging_run
import pytest
import ready

from sparkctl.cli.app import run as command
from sparkctl.manifest.schema import MtpTable
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import read_seal
from sparkctl.steps.show import next_command, show
from sparkctl.words import here

Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command, which has to end well; its stdout."""

    def call(*arguments: object, status: int = 0) -> str:
        assert command([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return call


@pytest.fixture
def trained(tmp_path: Path, llama_folder: Path, say: Say) -> Run:
    run = ready.run(tmp_path / "r1", llama_folder, count=12, max_steps=3)
    say("train", run.root)
    return Run.open(run.root)


def states(say: Say, run: Run) -> dict[str, str]:
    steps = json.loads(say("show", run.root, "--json"))["steps"]
    return {name: step["status"] for name, step in steps.items()}


def hint(say: Say, run: Run, step: str) -> str:
    return json.loads(say("show", run.root, "--json"))["steps"][step]["hint"]


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


@pytest.fixture
def merged(tmp_path: Path, qwen35_folder: Path, say: Say) -> Run:
    """A run of a Qwen3.5 that is trained and merged."""
    run = ready.run(tmp_path / "r1", qwen35_folder, count=12, max_steps=3, save_every=1)
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.model_type = "qwen3_5"
    say("train", run.root)
    say("merge", run.root)
    return Run.open(run.root)


def test_each_adapter_has_a_row_of_its_own(merged: Run, say: Say) -> None:
    say("merge", merged.root, "--adapter-only=text")
    assert json.loads(say("merge", merged.root, "--adapter-only", "--json"))["next"] is None
    found = json.loads(say("show", merged.root, "--json"))["steps"]
    assert found["adapter"]["detail"].endswith("/r1/adapter")
    assert found["adapter, text"]["detail"].endswith("/r1/adapter-text")
    shutil.rmtree(merged.root / "adapter-text")
    assert hint(say, merged, "adapter, text") == f"sparkctl merge {merged.root} --adapter-only=text --force"


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


def test_a_head_is_trained_and_then_served(merged: Run, say: Say) -> None:
    assert next_command(merged.root) == f"sparkctl mtp train {merged.root}"
    assert f"\nnext: sparkctl mtp train {merged.root}\n" in say("merge", merged.root)
    leave_head(merged)
    assert next_command(merged.root) == f"sparkctl mtp inject {merged.root} --mode trained"
    with merged.edit() as manifest:
        manifest.mtp = MtpTable(mode="skipped", skipped="there is none", made_from="x")
    assert next_command(merged.root) is None


def test_a_merge_is_looked_into(merged: Run, say: Say) -> None:
    say("merge", merged.root, "--adapter-only")
    assert states(say, merged)["merge"] == states(say, merged)["adapter"] == "done"
    (merged.root / "merged" / "config.json").write_text("{}")
    assert states(say, merged)["merge"] == "stale"
    assert hint(say, merged, "merge") == f"sparkctl merge {merged.root} --force"
    elsewhere = merged.root.parent / "my model"
    say("merge", merged.root, "--out", elsewhere)
    (elsewhere / "config.json").write_text("{}")
    assert hint(say, merged, "merge") == f"sparkctl merge {merged.root} --out '{here(elsewhere)}' --force"


def leave_head(run: Run, model: str = "merged") -> None:
    """As `mtp train` leaves a run. model: the merged folder, in the run."""
    (run.root / "mtp").mkdir(exist_ok=True)
    (run.root / "mtp" / "head.safetensors").touch()
    seal = read_seal(run.root / model)
    assert seal
    with run.edit() as manifest:
        manifest.mtp = MtpTable(mode="trained", head="mtp/head.safetensors", merged=seal.digest, made_from="x")


def with_head(run: Run, say: Say) -> None:
    """As `mtp train` and `mtp inject` leave a run."""
    leave_head(run)
    say("mtp", "inject", run.root, "--mode", "default")


LATER = ("merge", "mtp train", "mtp inject")


def test_what_was_made_from_a_stale_training_is_stale(merged: Run, say: Say) -> None:
    with_head(merged, say)
    assert set(states(say, merged).values()) == {"done"}
    with merged.edit() as manifest:
        assert manifest.analysis
        manifest.analysis.made_from = "other data"
    found = states(say, merged)
    assert {found[name] for name in ("recommend", "train", *LATER)} == {"stale"}
    assert "its training is stale" in say("show", merged.root)
    assert (next_command(merged.root) or "").startswith(f"sparkctl recommend {merged.root} ")
    assert [hint(say, merged, name) for name in ("train", *LATER)] == [None] * 4


def test_a_merge_of_a_stale_training_says_so(merged: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        assert command(["merge", str(merged.root)]) == 0
        return capsys.readouterr().err

    anew = (
        f"warning: the training of `{merged.root}` was by another plan or other data than it holds now: "
        f"`sparkctl train {merged.root} --force` trains it anew\n"
    )
    assert anew not in said()
    with merged.edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate *= 2
    assert anew in said()


def test_a_merge_of_a_stopped_training_says_so(merged: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with merged.edit() as manifest:
        assert manifest.train
        manifest.train.status, manifest.train.step = "interrupted", 1
    assert command(["merge", str(merged.root)]) == 0
    hint = f"`sparkctl resume {merged.root}` ends it"
    assert f"warning: the training stopped at step 1 of 2: {hint}\n" in capsys.readouterr().err


def test_a_training_begun_anew_leaves_the_merge_stale(merged: Run, say: Say) -> None:
    """The checkpoint has the same name, and other bytes; what is merged from it then is another model."""
    with_head(merged, say)
    with merged.edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate *= 2
    say("train", merged.root, "--force")
    found = states(say, merged)
    assert found["train"] == "done"
    assert {found[name] for name in LATER} == {"stale"}
    assert next_command(merged.root) == f"sparkctl merge {merged.root} --force"
    say("merge", merged.root, "--force")
    assert [hint(say, merged, name) for name in LATER] == [
        None, f"sparkctl mtp train {merged.root} --force",
        f"sparkctl mtp inject {merged.root} --mode default --force",
    ]  # fmt: skip
    found = states(say, merged)
    assert [found[name] for name in LATER] == ["done", "stale", "stale"]
    assert "the merged model is another one by now" in say("show", merged.root)


def test_what_is_served_of_another_merged_model_is_stale(merged: Run, say: Say) -> None:
    """Wherever the model lay that it was made from; one that `--into` named is no merged model to compare with."""
    with_head(merged, say)
    now = merged.manifest.merge
    assert now
    another = next(c.id for c in merged.manifest.checkpoints if c.kind == "step" and c.id != now.checkpoint)
    say("merge", merged.root, "--checkpoint", another, "--out", merged.root / "other")
    assert states(say, merged)["mtp inject"] == "stale"
    assert "the merged model is another one by now" in say("show", merged.root)
    leave_head(merged, "other")  # trained anew for this model
    mend = f"sparkctl mtp inject {merged.root} --mode default --force"
    assert hint(say, merged, "mtp inject") == mend
    shutil.rmtree(merged.root / "merged")
    assert states(say, merged)["mtp inject"] == "stale"
    say(*mend.split()[1:])
    assert states(say, merged)["mtp inject"] == "done"
    say(*mend.split()[1:], "--into", merged.root / "other")
    say("merge", merged.root, "--force")
    assert states(say, merged)["mtp inject"] == "done"


def test_a_merge_that_the_training_went_past_is_stale(tmp_path: Path, llama_folder: Path, say: Say) -> None:
    run = ready.run(tmp_path / "r1", llama_folder, count=12, max_steps=3, save_every=1)
    say("train", run.root)
    with run.edit() as manifest:
        assert manifest.train
        best, manifest.train.started = manifest.train.best_checkpoint, "2026-01-01T00:00:00Z"
        manifest.train.best_checkpoint = next(c.id for c in manifest.checkpoints if c.kind == "step" and c.id != best)
    say("merge", run.root)
    with run.edit() as manifest:
        assert manifest.train
        manifest.train.best_checkpoint = best
    assert f"; the best checkpoint is {best} by now" in say("show", run.root)
    assert next_command(run.root) == f"sparkctl merge {run.root}"
    say("merge", run.root)
    assert next_command(run.root) is None


def test_a_stale_merge_is_mended_from_the_checkpoint_that_was_asked_for(merged: Run, say: Say) -> None:
    first = min(c.step for c in merged.manifest.checkpoints if c.kind == "step" and c.step is not None)
    for asked in (f"step-{first:06d}", "last", "best"):
        say("merge", merged.root, "--checkpoint", asked, "--force")
        (merged.root / "merged" / "config.json").write_text("{}")
        mend = next(step.mend for step in show(merged.root).steps if step.name == "merge")
        option = "" if asked == "best" else f" --checkpoint {asked}"
        assert mend == f"sparkctl merge {merged.root}{option} --force"
        before = Run.open(merged.root).manifest.merge
        say(*mend.split()[1:])
        after = Run.open(merged.root).manifest.merge
        assert before
        assert after
        assert (after.checkpoint, after.asked) == (before.checkpoint, asked)


def test_a_checkpoint_that_is_gone_is_not_asked_for_again(merged: Run, say: Say) -> None:
    with merged.edit() as manifest:
        assert manifest.merge
        manifest.merge.asked = manifest.merge.checkpoint = "step-000099"
    assert f"sparkctl merge {merged.root} --force" in "".join(say("show", merged.root).splitlines())


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
    at = {name: line.index(name) for line in say("show", second.root).splitlines() for name in LINKS if name in line}
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
