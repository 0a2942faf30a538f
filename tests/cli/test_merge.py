"""`sparkctl merge` from the command line: what it writes, says and records, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import merging
import merging_run
import pytest
from safetensors.torch import load_file

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run
from sparkctl.train import state

Said = pytest.CaptureFixture[str]


@pytest.fixture
def run(qwen35_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    monkeypatch.chdir(tmp_path)
    return made


def merge(*arguments: str, status: int = 0) -> None:
    assert sparkctl(["merge", *arguments]) == status


def answer(said: Said, *arguments: str, status: int = 0) -> dict[str, Any]:
    said.readouterr()
    merge(*arguments, "--json", status=status)
    return json.loads(said.readouterr().out)


def refused(said: Said, status: int, *arguments: str) -> str:
    """What stderr says of a command that fails as it should."""
    said.readouterr()
    merge(*arguments, status=status)
    text = said.readouterr().err
    assert text.startswith("error: ")
    assert "\nhint: " in text
    assert "Traceback" not in text
    return text


def entries(folder: Path) -> list[str]:
    """Everything in a folder but locks."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (".step.lock", ".step.json"))


def test_the_best_checkpoint_is_merged_recorded_and_served(run: Run, qwen35_folder: Path, said: Said) -> None:
    result = answer(said, "r1")
    manifest = Run.open(run.root).manifest
    assert manifest.merge
    assert (manifest.merge.checkpoint, manifest.merge.folder) == ("step-000003", "merged")
    assert (manifest.merge.tensors, manifest.merge.changed_tensors) == (result["tensors"], result["changed_tensors"])
    entry = manifest.checkpoint("merged-000003")
    assert entry
    assert (entry.kind, entry.parent, entry.path, entry.eval_loss) == ("merged", "step-000003", "merged", 0.3)
    assert result["serve"] == "vllm serve r1/merged --served-model-name r1 --max-model-len 4096"
    before, after = merging.tensors(qwen35_folder), merging.tensors(run.root / "merged")
    halves = load_file(run.root / "checkpoints" / "step-000003" / "trainable.safetensors")
    for name in {merging.base_name(half) for half in halves}:
        a, b = (halves[name.removesuffix("weight") + f"lora_{x}.weight"].double() for x in "AB")
        assert merging.rounded_once(after[name], before[name].double() + 6 / 4 * b @ a)  # alpha / r


def test_a_second_run_is_up_to_date_until_something_changes(run: Run, said: Said) -> None:
    merge("r1")
    written = (run.root / "merged" / "config.json").stat().st_mtime_ns, (run.root / "run.toml").read_bytes()
    assert answer(said, "r1")["up_to_date"] is True
    merge("r1")
    assert "merge (up to date: nothing was done, this is the result of 20" in said.readouterr().out
    assert ((run.root / "merged" / "config.json").stat().st_mtime_ns, (run.root / "run.toml").read_bytes()) == written
    assert "error: `r1/merged` was made from step-000003" in refused(said, 2, "r1", "--checkpoint", "last")
    assert answer(said, "r1", "--checkpoint", "last", "--force")["up_to_date"] is False
    kinds = [c.id for c in Run.open(run.root).manifest.checkpoints if c.kind == "merged"]
    assert kinds == ["merged-000006"]
    shard = next((run.root / "merged").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(2**62, 2**62))
    refused(said, 2, "r1", "--checkpoint", "last")
    assert answer(said, "r1", "--checkpoint", "last", "--force")["up_to_date"] is False
    assert answer(said, "r1", "--checkpoint", "last")["up_to_date"] is True


def train_on(run: Run, best: str) -> None:
    """As a resume leaves it that found a better checkpoint; its training began before any merge."""
    with run.edit() as manifest:
        assert manifest.train
        manifest.train.started, manifest.train.best_checkpoint = "2026-01-01T00:00:00Z", best


def test_what_the_training_went_past_is_made_anew(run: Run, said: Said) -> None:
    merge("r1")
    train_on(run, "step-000006")
    assert answer(said, "r1", "--dry-run")["checkpoint"] == "step-000006"
    said.readouterr()
    merge("r1")
    assert "`r1/merged` was made from step-000003: it is made anew from step-000006\n" in said.readouterr().err
    assert answer(said, "r1")["up_to_date"] is True
    table = Run.open(run.root).manifest.merge
    assert table
    assert (table.checkpoint, table.asked) == ("step-000006", "best")


@pytest.mark.parametrize("options", [(), ("--adapter-only",)])
def test_every_folder_is_remembered_whatever_out_named_since(options: tuple[str, ...], run: Run, said: Said) -> None:
    """The usual one too; one that was asked for with another checkpoint is no folder of this command."""
    for out in ((), ("--out", "m"), ("--out", "named", "--checkpoint", "step-000003"), ("--out", "gone")):
        merge("r1", *options, *out)
    shutil.rmtree("gone")
    train_on(run, "step-000006")
    usual = "adapter" if options else "merged"
    for out, folder in (((), f"r1/{usual}"), (("--out", "m"), "m")):
        result = answer(said, "r1", *options, *out)
        assert (result["checkpoint"], result["folder"], result["up_to_date"]) == ("step-000006", folder, False)
        assert answer(said, "r1", *options, *out)["up_to_date"]
    assert "`named` was made from step-000003, not from" in refused(said, 2, "r1", *options, "--out", "named")
    table = getattr(Run.open(run.root).manifest, "adapter" if options else "merge")
    found = [(one.folder, one.checkpoint) for one in (table, *(table.others or ()))]
    assert found == [("../m", "step-000006"), (usual, "step-000006"), ("../named", "step-000003")]


def test_every_folder_has_its_place_among_the_checkpoints(run: Run) -> None:
    def entries_of(kind: str) -> list[tuple[str, str, str | None]]:
        return [(c.id, c.path, c.parent) for c in Run.open(run.root).manifest.checkpoints if c.kind == kind]

    merge("r1")
    merge("r1", "--out", "m")
    merge("r1")
    first, second = ("merged-000003", "merged", "step-000003"), ("merged-000003-2", "../m", "step-000003")
    assert entries_of("merged") == [second, first]
    for out in ((), ("--out", "s")):
        assert sparkctl(["mtp", "inject", "r1", "--mode", "default", *out]) == 0
    served = [("served-000003", "served", first[0]), ("served-000003-2", "../s", first[0])]
    assert entries_of("served") == served
    shutil.rmtree("m")
    merge("r1", "--checkpoint", "last", "--force")
    assert entries_of("merged") == [("merged-000006", "merged", "step-000006")]


def test_what_the_user_put_into_a_merge_is_not_swept_away(run: Run, said: Said) -> None:
    merge("r1")
    mine = run.root / "merged" / "notes.txt"
    mine.touch()
    assert answer(said, "r1")["up_to_date"]
    train_on(run, "step-000006")
    text = refused(said, 2, "r1")
    assert "error: `r1/merged` was changed since it was written\nhint: `sparkctl merge r1 --force` replaces it" in text
    assert mine.exists()


def test_one_true_reason_keeps_a_merge(run: Run, said: Said) -> None:
    def kept(*arguments: str) -> str:
        return refused(said, 2, "r1", *arguments).splitlines()[0].partition("` ")[2]

    merge("r1")
    train_on(run, "step-000003")
    assert kept("--checkpoint", "last") == "was made from step-000003, not from step-000006"
    train_on(run, "step-000006")
    (run.root / "merged" / "config.json").write_text("{}")
    assert kept() == "was changed since it was written"
    merge("r1", "--force")
    with run.edit() as manifest:
        assert manifest.train
        manifest.train.started, manifest.train.best_checkpoint = "2100-01-01T00:00:00Z", "step-000003"
    assert kept() == "was made from step-000006 of an earlier training"
    train_on(run, "step-000006")
    merge("r1", "--adapter-only", "--out", "m")
    assert kept("--out", "m") == "was written by `sparkctl merge r1 --adapter-only --out m`"
    with run.edit() as manifest:
        manifest.run.id = "another"
    assert kept("--checkpoint", "step-000003") == "is the merge of another run"


def test_a_base_with_other_files_is_the_reason(run: Run, said: Said, qwen35_folder: Path) -> None:
    base = Path("base")
    shutil.copytree(qwen35_folder, base)
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.source = "../base"
    merge("r1")
    train_on(run, "step-000003")
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    assert "was made from step-000003 with other files of the base\n" in refused(said, 2, "r1")


def test_up_to_date_is_said_without_torch(run: Run) -> None:
    merge("r1")
    program = (
        "import sys; from sparkctl.cli.app import run; status = run(['merge', 'r1']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr


@pytest.mark.parametrize("options", [(), ("--adapter-only",)])
def test_a_dry_run_writes_nothing_and_counts_the_same(options: tuple[str, ...], run: Run, said: Said) -> None:
    before = (run.root / "run.toml").read_bytes(), entries(run.root)
    planned = answer(said, "r1", *options, "--dry-run")
    assert ((run.root / "run.toml").read_bytes(), entries(run.root)) == before
    done = answer(said, "r1", *options)
    assert all(planned[key] == done[key] for key in ("tensors", "changed_tensors", "bytes", "checkpoint", "serve"))


def test_a_named_checkpoint_into_a_folder_of_ones_own(run: Run, said: Said) -> None:
    assert answer(said, "r1", "--checkpoint", "step-000006", "--out", "elsewhere/m")["folder"] == "elsewhere/m"
    assert Path("elsewhere/m/config.json").exists()
    merged = Run.open(run.root).manifest.merge
    assert merged
    assert merged.folder == "../elsewhere/m"


@pytest.mark.parametrize(
    ("option", "folder", "starts"),
    [
        ("--adapter-only", "adapter", "vllm serve "),
        ("--adapter-only=multimodal", "adapter", "vllm serve "),
        ("--adapter-only=text", "adapter-text", "python -c "),
    ],
)
def test_the_adapter_alone(option: str, folder: str, starts: str, run: Run, said: Said) -> None:
    result = answer(said, "r1", option)
    assert result["folder"] == f"r1/{folder}"
    assert result["serve"].startswith(starts)
    if starts == "vllm serve ":
        assert result["serve"].endswith(f"--enable-lora --max-lora-rank 8 --lora-modules r1=r1/{folder}")
    assert entries(run.root / folder) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "sparkctl.json",
    ]  # fmt: skip
    manifest = Run.open(run.root).manifest
    assert manifest.merge is None
    adapter, other = manifest.adapter, manifest.adapter_text
    if folder == "adapter-text":
        adapter, other = other, adapter
    assert adapter
    assert adapter.folder == folder
    assert other is None
    assert answer(said, "r1", option)["up_to_date"] is True


def test_the_card_tells_the_lineage_and_no_local_path(qwen35_folder: Path, tmp_path: Path) -> None:
    import yaml

    parent = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    child = merging_run.trained_run(tmp_path / "r2", qwen35_folder, parent=parent)
    merge(str(child.root))
    with child.edit() as manifest:
        manifest.plan = manifest.plan and manifest.plan.model_copy(update={"max_steps": manifest.plan.steps})
    merge(str(child.root), "--adapter-only")
    for folder, library, epochs in (("merged", "transformers", "2"), ("adapter", "peft", "at most 2")):
        text = (child.root / folder / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        matter = yaml.safe_load(front)
        assert (matter["library_name"], matter["base_model"]) == (library, qwen35_folder.name)
        assert "sparkctl" in matter["tags"]
        assert f"| epochs | {epochs} |" in body
        for told in (child.manifest.run.id, parent.manifest.run.id, "ab" * 32, "0.3000", "vllm serve", "0.01"):
            assert told in body, told
        assert str(tmp_path) not in text
        assert "secret" not in text
        assert str(qwen35_folder) not in text


def test_a_training_that_is_still_going_on(run: Run, said: Said) -> None:
    started, ended = threading.Event(), threading.Event()

    def train() -> None:
        with Run.open(run.root).step("train"):
            started.set()
            ended.wait(30)

    worker = threading.Thread(target=train)
    worker.start()
    started.wait(30)
    try:
        assert "`train` is running" in refused(said, 1, "r1")
    finally:
        ended.set()
        worker.join()
    merge("r1")


@pytest.mark.parametrize("wanted", ["step-000009", "bset"])
def test_a_checkpoint_that_is_not_there(wanted: str, run: Run, said: Said) -> None:
    text = refused(said, 2, "r1", "--checkpoint", wanted)
    assert wanted in text
    assert "step-000003, step-000006" in text


def test_a_damaged_checkpoint_is_named(run: Run, said: Said) -> None:
    path = run.root / "checkpoints" / "step-000003" / "trainable.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "trainable.safetensors` is damaged" in refused(said, 1, "r1")
    assert "merged" not in entries(run.root)


@pytest.mark.parametrize(("table", "command"), [("train", "sparkctl train"), ("analysis", "sparkctl analyze")])
def test_a_step_that_is_missing_is_named(table: str, command: str, run: Run, said: Said) -> None:
    with run.edit() as manifest:
        setattr(manifest, table, None)
    assert f"hint: {command}" in refused(said, 2, "r1")


def test_no_run_at_all(said: Said, tmp_path: Path) -> None:
    assert "is not a run" in refused(said, 2, str(tmp_path / "none"))


def test_an_adapter_of_a_full_fine_tuning(run: Run, qwen35_folder: Path, said: Said) -> None:
    masters = merging.masters(qwen35_folder, run.root / "m.safetensors")
    entry = merging_run.save(run, masters, state.State(mode="full", step=9))
    with run.edit() as manifest:
        manifest.checkpoints.append(entry)
    assert "no adapter" in refused(said, 2, "r1", "--checkpoint", "step-000009", "--adapter-only")
    merge("r1", "--checkpoint", "step-000009")
    assert "fp32 masters" in (run.root / "merged" / "README.md").read_text()


def test_a_target_that_exists_is_left_alone(run: Run, said: Said) -> None:
    mine = Path("mine")
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for options in ((), ("--force",)):
        text = refused(said, 2, "r1", "--out", "mine", *options)
        assert "no merge wrote it" in text
        assert "--out" in text
    assert entries(mine) == ["thesis.txt"]
    Path("file").write_text("mine")
    refused(said, 2, "r1", "--out", "file", "--force")
    assert Path("file").read_text() == "mine"
    for taken in ("r1", "r1/checkpoints", "r1/checkpoints/step-000003"):
        refused(said, 2, "r1", "--out", taken, "--force")
    merge("r1", "--out", "m")
    assert "--force" in refused(said, 2, "r1", "--out", "m", "--checkpoint", "last")
    merge("r1", "--out", "m", "--checkpoint", "last", "--force")


def test_what_a_killed_merge_left_beside_its_target_is_swept(run: Run) -> None:
    """And nothing else that lies there."""
    for name in (".m.abc.tmp", ".mine.abc.tmp", ".m.txt"):
        Path(name).mkdir()
    merge("r1", "--out", "m")
    assert not Path(".m.abc.tmp").exists()
    assert Path(".mine.abc.tmp").exists()
    assert Path(".m.txt").exists()


def test_an_unknown_class_is_wrong_usage(run: Run, said: Said) -> None:
    refused(said, 2, "r1", "--adapter-only=vision")


def test_a_base_that_changed_is_named(run: Run, qwen35_folder: Path, tmp_path: Path, said: Said) -> None:
    other = Path(shutil.copytree(qwen35_folder, tmp_path / "other"))
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.source = "../other"
    with (other / "config.json").open("a") as file:
        file.write("\n")
    assert "config.json" in refused(said, 2, "r1")


@pytest.mark.parametrize("option", [(), ("--adapter-only",)])
def test_a_full_disk_leaves_nothing(option: tuple[str, ...], run: Run, small_disk: Path, said: Said) -> None:
    """A disk that is too small is seen before the work; one that fills up meanwhile, when it is full."""
    filler = small_disk / "filler"
    for seen in (True, False):
        room = 60_000 if seen else 20_000
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - room))
        with pytest.MonkeyPatch.context() as patch:
            if not seen:
                patch.setattr("sparkctl.merge.merge.require_space", lambda out, size: None)
                patch.setattr("sparkctl.merge.adapter.require_space", lambda out, size: None)
            text = refused(said, 1, "r1", "--out", str(small_disk / "out"), *option)
        assert ("MB free" in text) == seen
        assert (os.strerror(errno.ENOSPC).lower() in text) != seen
        assert entries(small_disk) == ["filler"]
        filler.unlink()
    assert Run.open(run.root).manifest.merge is None


@pytest.fixture
def said(capsys: Said) -> Said:
    return capsys
