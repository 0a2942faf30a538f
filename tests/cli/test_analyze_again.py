"""A run analysed once more: what was said then still counts, also after a move; hints hold the user's own words."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import ready
import tiny
from analyzing import Analyze, chat, lines

from sparkctl.cli import app
from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Manifest
from sparkctl.manifest.store import NAME, Run, read_manifest
from sparkctl.steps.inputs import analyze_command
from sparkctl.steps.training import parent_of, planned

RECIPE = "qwen3.5-0.8b-lora"


def told(manifest: Manifest) -> tuple[object, ...]:
    """What flags decided."""
    assert manifest.data
    assert manifest.model
    template = manifest.model.chat_template
    return (
        manifest.data.recipe, manifest.data.eval_fraction, manifest.data.max_seq_length, manifest.model.allow_unknown,
        template.sha256, template.given,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.chats(tmp_path / "chats.jsonl")


def test_what_was_said_is_remembered(analyze: Analyze, tmp_path: Path, data: Path) -> None:
    folder, template = tmp_path / "r1", tmp_path / "t.jinja"
    template.write_text(tiny.CHATML + "{# mine #}")
    flags = (
        "--recipe", RECIPE, "--eval-fraction", 0.3, "--max-seq-length", 900, "--chat-template", template,
        "--allow-unknown",
    )  # fmt: skip
    assert analyze(data, "--run", folder, *flags).status == 0
    before = told(read_manifest(folder))
    assert before[:4] == (RECIPE, 0.3, 900, True)
    template.unlink()
    assert analyze(data, "--run", folder, model=None).json["up_to_date"]
    lines(data, *(chat(f"q{i}", "answer " * 30) for i in range(40)))
    assert analyze(data, "--run", folder, model=None).json["up_to_date"] is False
    assert told(read_manifest(folder)) == before
    assert analyze(data, "--run", folder, "--max-seq-length", 800, "--eval-fraction", 0.1, model=None).status == 0
    after = told(read_manifest(folder))
    assert after == (RECIPE, 0.1, 800, *before[3:])


def test_the_run_comes_before_its_parent(analyze: Analyze, tmp_path: Path, data: Path) -> None:
    r1, r2 = tmp_path / "r1", tmp_path / "r2"
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 3\n")
    assert analyze(data, "--run", r1, "--max-seq-length", 900, "--recipe", RECIPE).status == 0
    child = analyze(data, "--run", r2, "--parent", r1, "--max-seq-length", 800, "--recipe", recipe, model=None)
    assert child.status == 0
    assert analyze(data, "--run", r2, "--force", model=None).status == 0
    assert told(read_manifest(r2))[:3] == ("../mine.toml", 0.02, 800)


def test_the_models_own_template_is_read_anew(
    analyze: Analyze, tmp_path: Path, data: Path, qwen35_folder: Path
) -> None:
    """A run that was given none has no claim on the one it found."""
    model = Path(shutil.copytree(qwen35_folder, tmp_path / "model"))
    assert analyze(data, "--run", tmp_path / "r1", model=model).status == 0
    (model / "chat_template.jinja").write_text(tiny.CHATML + "{# another #}")
    assert analyze(data, "--run", tmp_path / "r1", model=None).json["up_to_date"] is False
    assert (tmp_path / "r1" / "chat_template.jinja").read_text().endswith("{# another #}")


def test_a_given_template_that_changed_in_the_run_is_named(analyze: Analyze, tmp_path: Path, data: Path) -> None:
    template, copy = tmp_path / "t.jinja", tmp_path / "r1" / "chat_template.jinja"
    template.write_text(tiny.CHATML)
    assert analyze(data, "--run", copy.parent, "--chat-template", template).status == 0
    copy.write_text("other")
    changed = analyze(data, "--run", copy.parent, model=None)
    copy.unlink()
    gone = analyze(data, "--run", copy.parent, model=None)
    assert (changed.status, gone.status) == (1, 1)
    assert "changed since it was recorded" in changed.err
    assert "is gone" in gone.err
    assert "--chat-template FILE" in gone.err
    assert analyze(data, "--run", copy.parent, "--chat-template", template, model=None).status == 0
    assert copy.read_text() == tiny.CHATML


@pytest.mark.parametrize("name", ["generation_config.json", "additional_chat_templates/tool_use.jinja"])
def test_files_that_decide_over_the_mask_are_looked_at(
    analyze: Analyze, tmp_path: Path, data: Path, qwen35_folder: Path, name: str
) -> None:
    model = Path(shutil.copytree(qwen35_folder, tmp_path / "model"))
    assert analyze(data, "--run", tmp_path / "r1", model=model).status == 0
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(tiny.CHATML if name.endswith("jinja") else json.dumps({"eos_token_id": [65]}))
    assert analyze(data, "--run", tmp_path / "r1", model=model).json["up_to_date"] is False
    assert analyze(data, "--run", tmp_path / "r1", model=model).json["up_to_date"] is True


def test_a_moved_run_goes_on(
    analyze: Analyze, tmp_path: Path, data: Path, qwen35_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Analyse, move to another depth, then two steps that write, each of which needs the model."""
    assert analyze(data, "--run", tmp_path / "r1").status == 0
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = Path(shutil.move(tmp_path / "r1", tmp_path / "deep" / "er" / "r1"))
    for _ in range(2):
        assert app.run(["recommend", str(moved), "--json", "--force"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    run = Run.open(moved)
    assert run.manifest.model
    assert run.resolve(run.manifest.model.source) == qwen35_folder
    again = analyze(data, "--run", moved, model=None)
    assert again.json["up_to_date"] is True, again.err


def test_a_moved_plan_stays_up_to_date(
    analyze: Analyze, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 3\n")
    assert analyze(data, "--run", tmp_path / "r1", "--recipe", recipe).status == 0
    assert app.run(["recommend", str(tmp_path / "r1"), "--json"]) == 0
    (tmp_path / "deep").mkdir()
    moved = Path(shutil.move(tmp_path / "r1", tmp_path / "deep" / "r1"))
    capsys.readouterr()
    assert app.run(["recommend", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True


def test_a_parent_that_moved(analyze: Analyze, tmp_path: Path, data: Path) -> None:
    """The hint says how to name it; that it is another place alone is written down though no token changes."""
    r1, r2 = tmp_path / "r1", tmp_path / "r2"
    assert analyze(data, "--run", r1).status == 0
    assert analyze(data, "--run", r2, "--parent", r1, model=None).status == 0
    (tmp_path / "old").mkdir()
    there = Path(shutil.move(r1, tmp_path / "old" / "r1"))
    answer = analyze(data, "--run", r2, model=None)
    assert answer.status == 2
    assert "which is no run" in answer.err
    with pytest.raises(UsageError, match="which is no run") as caught:
        parent_of(Run.open(r2))
    hint = caught.value.hint or ""
    words = shlex.split(hint.partition(": ")[2])
    assert words[:2] == ["sparkctl", "analyze"]
    assert words[-2:] == ["--parent", "FOLDER"]
    assert not (r1 / NAME).exists()
    named = analyze(*words[2:-1], there, model=None)
    assert named.status == 0, named.err
    assert named.json["up_to_date"] is True
    assert read_manifest(r2).run.parent == "../old/r1"
    assert analyze(data, "--run", r2, model=None).json["up_to_date"] is True


def test_a_model_that_moved(analyze: Analyze, tmp_path: Path, data: Path, qwen35_folder: Path) -> None:
    model = Path(shutil.copytree(qwen35_folder, tmp_path / "model"))
    assert analyze(data, "--run", tmp_path / "r1", model=model).status == 0
    model = model.rename(tmp_path / "elsewhere")
    assert analyze(data, "--run", tmp_path / "r1", model=model).json["up_to_date"] is True
    manifest = read_manifest(tmp_path / "r1")
    assert manifest.model
    assert manifest.model.source == manifest.checkpoints[0].path == "../elsewhere"


def test_data_that_moved(analyze: Analyze, tmp_path: Path, data: Path) -> None:
    """The same bytes under another name: hints name them where they are now."""
    assert analyze(data, "--run", tmp_path / "r1").status == 0
    moved = data.rename(tmp_path / "elsewhere.jsonl")
    said = analyze(moved, "--run", tmp_path / "r1").json
    assert (said["up_to_date"], said["data"]["files"][0]["path"]) == (True, "../elsewhere.jsonl")
    assert read_manifest(tmp_path / "r1").data.files[0].examples > 0
    assert shlex.split(analyze_command(Run.open(tmp_path / "r1")))[2] == os.path.relpath(moved)


def test_a_hint_analyses_as_the_user_did(
    analyze: Analyze, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write("{broken\n")
    folder = tmp_path / "r1"
    assert analyze(data, "--run", folder, "--skip-bad", "--eval-fraction", 0.3).status == 0
    assert app.run(["recommend", str(folder), "--json"]) == 0
    capsys.readouterr()
    (folder / "tokens" / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="is not what `analyze` wrote") as caught:
        planned(Run.open(folder))
    words = shlex.split(caught.value.hint or "")
    assert words[-1] == "--force"
    answer = analyze(*words[2:], model=None)
    assert answer.status == 0, answer.err
    assert answer.json["data"]["eval_fraction"] == 0.3
    monkeypatch.chdir(tmp_path)
    assert analyze_command(Run.open(folder), shown=Path("r1")) == "sparkctl analyze chats.jsonl --run r1 --skip-bad"


def test_a_run_without_files_asks_for_data(tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "r1", llama_folder, count=12)
    assert analyze_command(run, "--force") == f"sparkctl analyze DATA --run {run.root} --force"
