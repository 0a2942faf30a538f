"""Bad lines, bad files, bad models and wrong usage: `sparkctl analyze` names them and leaves what was there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import heads
import pytest
import tiny
from analyzing import Analyze, chat, lines, snapshot

from sparkctl.data.messages import as_example
from sparkctl.data.split import prompt_key
from sparkctl.manifest.store import Run


def test_skip_bad_counts_and_shows_five(analyze: Analyze, tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", *["{broken"] * 7, *[chat(f"q{i}", "a") for i in range(12)])
    answer = analyze(data, "--run", tmp_path / "r1", "--skip-bad")
    assert answer.status == 0
    assert answer.json["data"]["dropped"]["bad_lines"] == 7
    assert len(answer.json["bad_lines"]) == answer.err.count("skipped:") == 5
    assert "d.jsonl:1" in answer.err
    again = analyze(data, "--run", tmp_path / "r1", "--skip-bad")
    assert again.json["up_to_date"]
    assert (again.json["bad_lines"], again.err.count("skipped:")) == (answer.json["bad_lines"], 5)


BAD_LINES = {
    "broken JSON": '{"messages": [',
    "no object": "[1, 2]",
    "no messages": {"text": "hello"},
    "empty messages": {"messages": []},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]},
    "image part": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "assistant", "content": "y"},
        ]
    },
    "no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_and_leaves_nothing(analyze: Analyze, tmp_path: Path, line: Any) -> None:
    data = lines(tmp_path / "d.jsonl", chat("a", "b"), line)
    answer = analyze(data, "--run", tmp_path / "r1")
    assert answer.status in (1, 2)
    assert "error:" in answer.err
    assert "d.jsonl:2" in answer.err
    assert "hint:" in answer.err
    assert answer.json["ok"] is False
    assert not (tmp_path / "r1").exists()


def test_bytes_that_are_not_utf8_are_named(analyze: Analyze, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(json.dumps(chat("a", "b")).encode() + b'\n{"messages": "\xff\xfe"}\n')
    answer = analyze(data, "--run", tmp_path / "r1")
    assert answer.status in (1, 2)
    assert "d.jsonl:2" in answer.err
    assert "UTF-8" in answer.err


def test_missing_and_empty_files(analyze: Analyze, tmp_path: Path) -> None:
    missing = analyze(tmp_path / "none.jsonl", "--run", tmp_path / "r1")
    assert missing.status == 2
    assert "no file" in missing.err
    (tmp_path / "empty.jsonl").touch()
    empty = analyze(tmp_path / "empty.jsonl", "--run", tmp_path / "r1")
    assert empty.status == 1
    assert "is empty" in empty.err
    (tmp_path / "blank.jsonl").write_text("\n\n")
    blank = analyze(tmp_path / "blank.jsonl", "--run", tmp_path / "r1")
    assert blank.status == 1
    assert all("hint:" in answer.err for answer in (missing, empty, blank))
    assert not (tmp_path / "r1").exists()


def test_what_is_no_file_says_how_to_make_one(analyze: Analyze, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    pipe = analyze(tmp_path / "pipe.jsonl", "--run", tmp_path / "r1")
    assert (pipe.status, pipe.json["error"]) == (2, f"`{tmp_path}/pipe.jsonl` is not a regular file")
    for name, said in (
        ("chats.parquet", f"`{tmp_path}/d/*.parquet`"),
        ("chats.jsonl.gz", f"`{tmp_path}/d/*.jsonl.gz`"),
        ("train/data-00000-of-00001.arrow", "to_parquet"),
    ):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        folder = analyze(tmp_path / "d", "--run", tmp_path / "r1")
        assert folder.status == 2
        assert said in folder.json["hint"]


def test_where_all_is_held_out_the_hint_is_about_the_reason(analyze: Analyze, tmp_path: Path) -> None:
    """Two prompts, both in the lower nine tenths; then the same data in a round after one that held all of it out."""
    prompts = [f"p{i}" for i in range(9) if prompt_key(as_example(chat(f"p{i}", "x"), ""), 0) < 0.8 * 2**64][:2]
    data = lines(tmp_path / "d.jsonl", *(chat(prompts[i % 2], f"a {i}") for i in range(12)))
    answer = analyze(data, "--run", tmp_path / "r1", "--eval-fraction", 0.8)
    assert (answer.status, answer.json["error"][:29]) == (1, "every example is held out, so")
    assert "lower `--eval-fraction`" in answer.json["hint"]
    assert analyze(data, tiny.chats(tmp_path / "c.jsonl"), "--run", tmp_path / "r1", "--eval-fraction", 0.8).status == 0
    child = analyze(data, "--run", tmp_path / "r2", "--parent", tmp_path / "r1")
    assert "give more data" in child.json["hint"]


def test_a_failure_leaves_an_earlier_analysis_as_it_was(analyze: Analyze, tmp_path: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    assert analyze(data, "--run", folder).status == 0
    before = snapshot(folder)
    data.write_text(data.read_text() + "{broken\n")
    assert analyze(data, "--run", folder).status == 1
    after = snapshot(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {".step.json"}


def test_a_folder_that_was_there_keeps_its_files(analyze: Analyze, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    data = lines(tmp_path / "d.jsonl", "{broken")
    assert analyze(data, "--run", folder).status == 1
    assert snapshot(folder) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize("name", ["tokens/mine.txt", "chat_template.jinja"])
def test_a_folder_with_files_of_those_names_is_refused(
    analyze: Analyze, tmp_path: Path, name: str, dry_run: tuple[str, ...]
) -> None:
    """Such as the model's own folder."""
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    for data in (lines(tmp_path / "bad.jsonl", "{broken"), tiny.chats(tmp_path / "chats.jsonl")):
        answer = analyze(data, "--run", folder, *dry_run)
        assert answer.status == 2
        assert f"`{Path(name).parts[0]}`" in answer.err
        assert "hint:" in answer.err
        assert snapshot(folder) == {name: b"mine"}


def test_stages_of_others_stay(analyze: Analyze, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / ".notes.abc.tmp").write_text("mine")
    (folder / ".tokens.abc.tmp").mkdir()  # of a killed analysis
    assert analyze(tiny.chats(tmp_path / "chats.jsonl"), "--run", folder).status == 0
    assert (folder / ".notes.abc.tmp").exists()
    assert not (folder / ".tokens.abc.tmp").exists()


def test_what_came_into_a_new_folder_meanwhile_stays(
    analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, create = tmp_path / "r1", Run.create

    def and_notes(*arguments: Any, **more: Any) -> Run:
        run = create(*arguments, **more)
        (folder / "notes.txt").write_text("mine")
        return run

    monkeypatch.setattr(Run, "create", and_notes)
    assert analyze(lines(tmp_path / "d.jsonl", "{broken"), "--run", folder).status == 1
    assert snapshot(folder) == {"notes.txt": b"mine"}


def test_a_loser_leaves_the_winners_run(analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another analysis finds the new run, and has its lock before the one that made it."""
    folder, create, winner = tmp_path / "r1", Run.create, ExitStack()

    def lose(*arguments: Any, **more: Any) -> Run:
        run = create(*arguments, **more)
        winner.enter_context(Run.open(folder).step("analyze"))
        (folder / "tokens").mkdir()
        return run

    monkeypatch.setattr(Run, "create", lose)
    with winner:
        answer = analyze(tiny.chats(tmp_path / "chats.jsonl"), "--run", folder)
    assert answer.status == 1
    assert "`analyze` is running" in answer.err
    assert (folder / "tokens").is_dir()
    assert Run.open(folder).manifest.run.name == "r1"


def changed_model(folder: Path, source: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


def test_models_that_do_not_serve(analyze: Analyze, tmp_path: Path, qwen35_folder: Path) -> None:
    data = tiny.chats(tmp_path / "chats.jsonl")

    def small_embedding(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["vocab_size"] = 100
        (folder / "config.json").write_text(json.dumps(config))

    bare = changed_model(tmp_path / "bare", qwen35_folder, lambda folder: tiny.tokenizer(folder, None))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    small = changed_model(tmp_path / "small", qwen35_folder, small_embedding)
    (tmp_path / "no-model").mkdir()
    for model, message in (
        (tmp_path / "no-model", "no-model"),
        (bare, "template"),
        (small, "the tokenizer of"),
    ):
        answer = analyze(data, "--run", tmp_path / "r1", model=model)
        assert answer.status in (1, 2), model
        assert message in answer.err
        assert "hint:" in answer.err
        assert not (tmp_path / "r1").exists()
    template = tmp_path / "my.jinja"
    template.write_text(tiny.CHATML)
    assert analyze(data, "--run", tmp_path / "r1", "--chat-template", template, model=bare).status == 0
    absent = analyze(data, "--run", tmp_path / "r2", "--chat-template", tmp_path / "none.jinja", model=bare)
    assert absent.status == 2
    assert "no file" in absent.err


def test_wrong_usage_is_said(analyze: Analyze, tmp_path: Path) -> None:
    data = tiny.chats(tmp_path / "chats.jsonl")
    for arguments, message in (
        ([data, "--run", tmp_path / "r1"], "which model to train"),
        ([data, "--run", tmp_path / "r1", "--continue"], "--parent"),
        ([data, "--run", tmp_path / "r1", "--parent", tmp_path / "none"], "is not a run"),
        ([data, "--run", tmp_path / "r1", "--parent", tmp_path / "r1"], "its own parent"),
        ([data, "--run", data, "--model", "x"], ""),
        (["--run", tmp_path / "r1"], "missing argument"),
    ):
        answer = analyze(*arguments, model=None)
        assert answer.status == 2, arguments
        assert message in answer.err
        assert not (tmp_path / "r1").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(mtp_num_hidden_layers=2), "has 2 layers of MTP head"),
        (dict(mtp_use_dedicated_embeddings=True), "an MTP head with embeddings of its own"),
        (dict(mtp_num_hidden_layers="one"), "mtp_num_hidden_layers = 'one'"),
    ],
)
def test_a_base_that_no_merge_could_keep_is_refused_before_anything(
    analyze: Analyze, tmp_path: Path, qwen35_folder: Path, changes: dict[str, Any], said: str
) -> None:
    """By its config.json, in the data's stead: hours before `train` would say it, and again where the run is there."""
    data = lines(tmp_path / "d.jsonl", *[chat(f"q{i}", "a") for i in range(12)])
    base = Path(shutil.copytree(qwen35_folder, tmp_path / "base"))
    line = (data, "--run", tmp_path / "r1", "--skip-bad")
    heads.configured(base, **changes)
    for more in ((), ("--dry-run",)):
        answer = analyze(*line, *more, model=base)
        assert (answer.status, said in answer.err) == (2, True)
        assert not (tmp_path / "r1").exists()
    if len(changes) == 1 and "one" not in changes.values():
        again = f"sparkctl analyze {data} --run {tmp_path / 'r1'} --model FOLDER_OR_HUB_ID --skip-bad"
        assert answer.json["hint"] == again
