"""`sparkctl show` of what a run made: merged models, adapters, heads and served models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ready
from showing import Say, hint, states

from sparkctl.cli.app import run as command
from sparkctl.manifest.schema import MtpTable
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import read_seal
from sparkctl.steps.show import next_command, show
from sparkctl.words import here


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


def test_what_is_to_be_copied_stays_whole_on_a_narrow_terminal(
    merged: Run, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands stand by themselves, the one that others need first; the model is named as it can be opened."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(merged.root)
    say("merge", merged.root, "--adapter-only")
    shutil.rmtree(merged.root / "adapter")
    said = say("show", merged.root)
    first, then = f"sparkctl mtp train {merged.root}", f"sparkctl merge {merged.root} --adapter-only --force"
    assert said.endswith(f"\n\nnext: {first}\n      {then}\n")
    assert merged.manifest.model
    model = here(merged.resolve(merged.manifest.model.source))
    assert f"model {model}, " in " ".join(said.split())


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
    with merged.edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate *= 2
    assert command(["merge", str(merged.root)]) == 0
    said = capsys.readouterr().err
    assert "trains it anew\n" in said
    assert "resume" not in said  # it would be refused


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
