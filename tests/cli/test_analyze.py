"""`sparkctl analyze` through the command line: what it writes, what it refuses, and what it leaves alone."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from analyzing import Analyze, chat, lines, snapshot

from sparkctl.cli import app
from sparkctl.data.split import FEW
from sparkctl.data.tokens import TokenStore
from sparkctl.manifest.schema import TrainTable
from sparkctl.manifest.store import Run, read_manifest


def test_a_run_is_made(analyze: Analyze, tmp_path: Path, qwen35_folder: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    answer = analyze(data, "--run", folder)
    assert answer.status == 0, answer.err
    run, store = Run.open(folder), TokenStore.open(folder / "tokens")
    manifest = run.manifest
    assert manifest.model and manifest.data and manifest.analysis  # noqa: PT018
    assert answer.json["analysis"] == manifest.analysis.model_dump(mode="json")
    assert run.resolve(manifest.model.source) == qwen35_folder
    assert manifest.model.vocab_size == 272
    assert (folder / manifest.model.chat_template.file).read_text() == tiny.CHATML
    assert [(f.path, f.examples) for f in manifest.data.files] == [("../chats.jsonl", 40)]
    assert manifest.analysis.examples == len(store) == 40
    assert manifest.analysis.eval_examples == store.held_out.sum() > 0
    assert manifest.analysis.train_examples == 40 - store.held_out.sum()
    assert manifest.analysis.tokens == store.lengths.sum()
    assert manifest.analysis.assistant_tokens == store.label_counts.sum()
    assert manifest.analysis.turns == (40 + 14) / 40
    assert manifest.analysis.digest == store.digest
    assert manifest.analysis.duplicates == 0
    assert [(c.id, c.kind, c.path) for c in manifest.checkpoints] == [("base", "base", manifest.model.source)]
    assert store.place(1) == "chats.jsonl:2"


def test_the_table_and_the_histogram(analyze: Analyze, tmp_path: Path) -> None:
    answer = analyze(tiny.chats(tmp_path / "chats.jsonl"), "--run", tmp_path / "r1", json=False)
    assert "40: 37 to train on, 3 held out" in answer.out
    assert "█" in answer.out
    assert answer.err == ""


def test_show_marks_what_is_trained(analyze: Analyze, tmp_path: Path) -> None:
    data = lines(tmp_path / "one.jsonl", chat("Hé?", "Yés."))
    answer = analyze(data, "--run", tmp_path / "r1", "--show", 1, json=False)
    assert "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n⟦Yés.<|im_end|>⟧" in answer.out
    again = analyze(data, "--run", tmp_path / "r1", "--show", 1)
    assert again.json["up_to_date"] is True
    assert again.json["shown"][0]["pieces"][1] == ["Yés.<|im_end|>", True]
    said = analyze(data, "--run", tmp_path / "r1", json=False).out
    assert said.startswith("analysis of r1 (up to date: nothing was done, this is the result of 20")


def test_show_obeys_no_control_character(analyze: Analyze, tmp_path: Path) -> None:
    data = lines(tmp_path / "one.jsonl", chat("a\tb\x1b[2J", "red\x1b[31m"))
    out = analyze(data, "--run", tmp_path / "r1", "--show", 1, json=False).out
    assert "b␛[2J" in out
    assert "red␛[31m" in out
    assert "\x1b[2J" not in out


def test_a_second_run_is_up_to_date_without_torch(tmp_path: Path, qwen35_folder: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    arguments = ["analyze", str(data), "--run", str(folder), "--model", str(qwen35_folder), "--json"]
    script = (
        "import sys; from sparkctl.cli.app import run; assert run(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules) or not sys.stderr.write('imported')"
    )
    assert app.run(arguments) == 0
    before = snapshot(folder)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2  # 0.4 s seen
    assert "up to date" in result.stderr
    assert "imported" not in result.stderr
    assert json.loads(result.stdout)["up_to_date"] is True
    assert snapshot(folder) == before


def test_what_changed_is_done_again(analyze: Analyze, tmp_path: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    assert analyze(data, "--run", folder).status == 0
    os.utime(data, (1, 1))
    assert analyze(data, "--run", folder).json["up_to_date"] is True  # the time alone says nothing
    assert analyze(data, "--run", folder, "--max-seq-length", 80).json["up_to_date"] is False
    tiny.chats(data, 41)
    answer = analyze(data, "--run", folder, "--max-seq-length", 10_000)
    assert (answer.json["up_to_date"], answer.json["analysis"]["examples"]) == (False, 41)
    assert answer.json["analysis"]["reused"] < 41
    assert analyze(data, "--run", folder, "--force").json["up_to_date"] is False
    store = folder / "tokens" / "data-00000-of-00001.arrow"
    store.write_bytes(store.read_bytes()[:-100])
    assert analyze(data, "--run", folder).json["up_to_date"] is False
    assert len(TokenStore.open(folder / "tokens")) == 41


def test_several_files_and_gzip(analyze: Analyze, tmp_path: Path) -> None:
    one = tiny.chats(tmp_path / "one.jsonl", 12)
    two = tmp_path / "two.jsonl.gz"
    two.write_bytes(gzip.compress(tiny.chats(tmp_path / "rest.jsonl", 15).read_bytes()))
    answer = analyze(one, two, "--run", tmp_path / "r1")
    assert [f["examples"] for f in answer.json["data"]["files"]] == [12, 15]
    assert answer.json["analysis"]["duplicates"] == 12
    assert answer.json["analysis"]["examples"] == 27
    shown = analyze(one, two, "--run", tmp_path / "r1", json=False).out
    assert "12 examples equal to an earlier one; each is kept" in shown


def test_examples_beyond_the_model_are_noted_with_the_command_that_leaves_them_out(
    analyze: Analyze, tmp_path: Path, qwen35_folder: Path
) -> None:
    base, made_for = shutil.copytree(qwen35_folder, tmp_path / "base"), 60
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = made_for
    (base / "config.json").write_text(json.dumps(config))
    short, long = (chat(f"question {i}", "word " * (100 if i == 5 else 2)) for i in (1, 5))
    data = lines(tmp_path / "chats.jsonl", short, long)
    answer = analyze(data, "--run", tmp_path / "r1", model=base)
    note = answer.json["notes"][0]
    longest = answer.json["analysis"]["max"]
    assert note.startswith(f"the longest example has {longest} tokens, and the model was made for {made_for}; `")
    command = shlex.split(note.split("`")[1])
    again = analyze(*command[2:], model=None)
    assert again.json["analysis"]["max"] <= made_for < longest
    assert [text for text in again.json["notes"] if "was made for" in text] == []


def test_too_little_held_out_is_noted_with_the_command_that_mends_it(analyze: Analyze, tmp_path: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl", 150), tmp_path / "r1"
    (note,) = analyze(data, "--run", folder).json["notes"]
    assert analyze(data, "--run", folder).json["notes"] == [note]  # also where it is up to date
    assert "below 16 that is chance" in note
    command = shlex.split(note.split("`")[1])
    assert analyze(*command[2:], model=None).status == 0
    analysis = read_manifest(folder).analysis
    assert analysis
    assert analysis.eval_examples >= FEW
    assert analyze(data, "--run", folder).json["notes"] == []
    assert analyze(data, "--run", folder, "--eval-fraction", 0).json["notes"] == []  # nothing is to be
    few = analyze(tiny.chats(tmp_path / "few.jsonl", 9), "--run", tmp_path / "r2").json["notes"]
    assert few[0].startswith("nothing is held out: ")
    some = analyze(tiny.chats(tmp_path / "some.jsonl", 60), "--run", tmp_path / "r3").json["notes"]
    assert [note.endswith("more chats mend it") for note in few + some] == [True, True]


def test_drops_are_counted(analyze: Analyze, tmp_path: Path) -> None:
    examples = [chat(f"q{i}", "a" * i) for i in range(1, 13)]
    data = lines(tmp_path / "d.jsonl", *examples, chat("q", ""), chat("q", "  \n"), chat("long", "x" * 300))
    answer = analyze(data, "--run", tmp_path / "r1", "--max-seq-length", 200)
    dropped = {"empty_assistant": 2, "no_trained_token": 0, "too_long": 1, "bad_lines": 0}
    assert answer.json["data"]["dropped"] == dropped
    assert answer.json["analysis"]["examples"] == 12


def test_nothing_left_is_an_error_with_the_counts(analyze: Analyze, tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", chat("q", ""), chat("long", "x" * 300))
    answer = analyze(data, "--run", tmp_path / "r1", "--max-seq-length", 100)
    assert answer.status == 1
    assert "2 read, 1 without assistant text, 1 longer than the limit" in answer.err
    assert not (tmp_path / "r1").exists()


@pytest.mark.parametrize(
    ("line", "options", "hint"),
    [
        (chat("long", "x" * 300), ["--max-seq-length", 100], "raise `--max-seq-length`"),
        ("{broken", ["--skip-bad"], "leave `--skip-bad` out"),
        (chat("q", ""), [], "an assistant turn with text"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}, [],
         "a `weight` of 0"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "w"}]},
         ["--chat-template", "chatml.jinja"], "a template that prints nothing of it"),
        ("", [], "one chat a line"),
    ],
)  # fmt: skip
def test_where_nothing_is_left_the_hint_is_about_the_reason(
    analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, options: list[object], hint: str
) -> None:
    (tmp_path / "chatml.jinja").write_text(tiny.CHATML)
    monkeypatch.chdir(tmp_path)
    answer = analyze(lines(tmp_path / "d.jsonl", line), "--run", tmp_path / "r1", *options)
    assert answer.status == 1
    assert hint in answer.json["hint"]


def test_a_limit_that_nobody_gave_here_is_told_with_whose_it_was(analyze: Analyze, tmp_path: Path) -> None:
    parent, long = tiny.chats(tmp_path / "chats.jsonl"), lines(tmp_path / "d.jsonl", chat("long", "x" * 3000))
    assert analyze(parent, "--run", tmp_path / "r1", "--max-seq-length", 1000).status == 0
    hint = analyze(long, "--run", tmp_path / "r2", "--parent", tmp_path / "r1", model=None).json["hint"]
    assert hint == f"raise `--max-seq-length`: it is 1,000, as in `{tmp_path / 'r1'}`"
    words = (parent, "--run", tmp_path / "r3", "--parent", tmp_path / "r1", "--max-seq-length", 900)
    assert analyze(*words, model=None).status == 0
    hint = analyze(long, "--run", tmp_path / "r3", "--force", model=None).json["hint"]
    assert hint == "raise `--max-seq-length`: it is 900, as it was before"


def test_dry_run_writes_nothing(analyze: Analyze, tmp_path: Path) -> None:
    data = tiny.chats(tmp_path / "chats.jsonl")
    dry = analyze(data, "--run", tmp_path / "r1", "--dry-run", "--show", 1)
    assert dry.status == 0
    assert dry.json["dry_run"] is True
    assert dry.json["shown"]
    assert not (tmp_path / "r1").exists()
    real = analyze(data, "--run", tmp_path / "r1").json["analysis"]
    same = set(real) - {"seconds", "digest"}
    assert {k: real[k] for k in same} == {k: dry.json["analysis"][k] for k in same}


def test_a_full_disk_leaves_nothing(analyze: Analyze, tmp_path: Path, small_disk: Path) -> None:
    data = lines(tmp_path / "d.jsonl", *(chat(f"question {i}", "word " * 200) for i in range(2000)))
    answer = analyze(data, "--run", small_disk / "r1")
    assert answer.status == 1
    assert f"{os.strerror(errno.ENOSPC).lower()} at `{small_disk / 'r1' / 'tokens'}`" in answer.err
    assert "hint:" in answer.err
    assert not list(small_disk.rglob("*.arrow"))
    assert not (small_disk / "r1").exists()


def trained(folder: Path) -> None:
    """Make the run one whose training is done."""
    with Run.open(folder).edit() as manifest:
        manifest.train = TrainTable(
            status="done", started="2026-01-01T00:00:00Z", engine="reference", versions={}, made_from="x", steps=1,
            trainable_parameters=1, estimated_seconds=1, estimated_peak_memory=1,
        )  # fmt: skip


def test_a_trained_run_is_not_changed_unasked(analyze: Analyze, tmp_path: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    assert analyze(data, "--run", folder).status == 0
    trained(folder)
    assert analyze(data, "--run", folder).json["up_to_date"] is True
    tiny.chats(data, 50)
    before = snapshot(folder)
    answer = analyze(data, "--run", folder)
    assert answer.status == 2
    assert "has been trained" in answer.err
    assert "--force" in answer.err
    assert snapshot(folder) == before
    assert analyze(data, "--run", folder, "--force").json["analysis"]["examples"] == 50


def test_a_running_step_is_not_disturbed(analyze: Analyze, tmp_path: Path) -> None:
    data, folder = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "r1"
    assert analyze(data, "--run", folder).status == 0
    tiny.chats(data, 50)
    with Run.open(folder).step("train"):
        answer = analyze(data, "--run", folder)
    assert answer.status == 1
    assert "`train` is running" in answer.err


def test_a_round_reuses_rows_and_keeps_what_was_held_out(analyze: Analyze, tmp_path: Path) -> None:
    old, folder = tiny.chats(tmp_path / "old.jsonl", 60), tmp_path / "r1"
    template = tmp_path / "t.jinja"
    template.write_text(tiny.CHATML + "{# another #}")
    assert analyze(old, "--run", folder, "--max-seq-length", 500, "--chat-template", template).status == 0
    first = TokenStore.open(folder / "tokens")
    new = lines(
        tmp_path / "new.jsonl",
        *(chat(f"new {i}", "answer") for i in range(200)),
        # the held-out prompts again, with other answers
        *(
            {"messages": [m if m["role"] == "user" else {**m, "content": "other"} for m in e["messages"]]}
            for e, held_out in zip(map(json.loads, old.read_text().splitlines()), first.held_out, strict=True)
            if held_out
        ),
    )
    answer = analyze(new, old, "--run", tmp_path / "r2", "--parent", folder, "--continue", model=None)
    assert answer.status == 0, answer.err
    run, second = Run.open(tmp_path / "r2"), TokenStore.open(tmp_path / "r2" / "tokens")
    manifest = run.manifest
    assert manifest.model and manifest.data and manifest.analysis  # noqa: PT018
    assert (manifest.run.parent, manifest.run.continues) == ("../r1", True)
    assert manifest.data.max_seq_length == 500
    assert (run.root / manifest.model.chat_template.file).read_text() == template.read_text()
    assert manifest.analysis.reused == 60
    held_out = set(first.prompt_keys[first.held_out])
    assert held_out
    assert not held_out & set(second.prompt_keys[~second.held_out])
    assert sum(key in held_out for key in second.prompt_keys) == 2 * first.held_out.sum()
    for i in range(60):  # the old rows are the same documents
        (a, b), (c, d) = first.document(i), second.document(len(second) - 60 + i)
        assert (a.tolist(), b.tolist()) == (c.tolist(), d.tolist())
    assert analyze(new, old, "--run", tmp_path / "r2", "--parent", folder, "--continue", model=None).json["up_to_date"]
    assert analyze(new, old, "--run", tmp_path / "r2", model=None).json["up_to_date"]  # the parent is remembered
    assert Run.open(tmp_path / "r2").manifest.run == manifest.run


def test_a_grandchild_keeps_what_the_first_round_held_out(analyze: Analyze, tmp_path: Path) -> None:
    old = tiny.chats(tmp_path / "old.jsonl", 30)
    other = lines(tmp_path / "other.jsonl", *(chat(f"other {i}", "x") for i in range(30)))
    runs = [tmp_path / name for name in ("r1", "r2", "r3")]
    assert analyze(old, "--run", runs[0], "--eval-fraction", 0.3).status == 0
    assert analyze(other, "--run", runs[1], "--parent", runs[0], "--eval-fraction", 0.02).status == 0
    assert analyze(old, other, "--run", runs[2], "--parent", runs[1]).status == 0
    first, _, third = (TokenStore.open(run / "tokens") for run in runs)
    once = set(first.prompt_keys[first.held_out].tolist())
    assert len(once) >= 5
    assert once <= set(third.prompt_keys[third.held_out].tolist())
    assert third.held_out.sum() < 15  # the fraction itself came down


def start(folder: Path, data: Path, model: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparkctl", "analyze", str(data), "--run", str(folder), "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(folder.glob(".tokens.*.tmp/rows.arrow")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_interrupted_or_killed_it_leaves_nothing_half_written(
    analyze: Analyze, tmp_path: Path, qwen35_folder: Path
) -> None:
    data = lines(tmp_path / "big.jsonl", *(chat(f"question {i}", "word " * 300) for i in range(20_000)))
    process = start(tmp_path / "r1", data, qwen35_folder)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "r1").exists()
    process = start(tmp_path / "r2", data, qwen35_folder)
    process.kill()
    process.communicate(timeout=30)
    assert not (tmp_path / "r2" / "tokens").exists()
    few = tiny.chats(tmp_path / "chats.jsonl")
    assert analyze(few, "--run", tmp_path / "r2").json["analysis"]["examples"] == 40
    assert not list((tmp_path / "r2").glob(".tokens*"))


def peak(data: Path, run: Path, model: Path, *options: str) -> int:
    """kB that `analyze` needs in a process of its own."""
    script = (
        "import re, sys; from sparkctl.cli.app import run; assert run(sys.argv[1:]) == 0\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # ru_maxrss has the parent's
    )
    arguments = ["analyze", str(data), "--run", str(run), "--model", str(model), "--json", *options]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("few", "times", "words"), [(4_000, 10, 20), (300, 4, 12_000)])  # short chats; 60 kB each
def test_memory_does_not_follow_the_file(tmp_path: Path, qwen35_folder: Path, few: int, times: int, words: int) -> None:
    peaks = []
    for count in (few, times * few):
        data = lines(tmp_path / f"{count}.jsonl", *(chat(f"question {i}", "word " * words) for i in range(count)))
        peaks.append(peak(data, tmp_path / f"r{count}", qwen35_folder))
    assert peaks[1] < 1.1 * peaks[0], peaks  # seen: .7 to 5.2 % more; all of the longer file would be a fifth


def test_memory_does_not_follow_a_line_that_is_dropped(tmp_path: Path, qwen35_folder: Path) -> None:
    """5 MB in one line: 50 MB more than without it were seen, 1,040 MB where it was tokenised."""
    chats = [chat(f"question {i}", "word") for i in range(100)]
    without = lines(tmp_path / "without.jsonl", *chats)
    with_it = lines(tmp_path / "with.jsonl", *chats, chat("word " * 1_000_000, "word"))
    limit = ("--max-seq-length", "4096")
    peaks = [peak(data, tmp_path / f"{data.stem}-run", qwen35_folder, *limit) for data in (without, with_it)]
    assert peaks[1] < peaks[0] + 150_000, peaks
