"""The manifest: checked whole, written whole, locked, migrated, movable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import holding
import pytest
import ready
from filelock import FileLock
from pydantic import ValidationError

from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest import schema, store
from sparkctl.manifest.schema import Checkpoint, DataFile, MergedFolder, MergeTable, PlanTable
from sparkctl.manifest.store import NAME, Run, read_manifest
from sparkctl.manifest.table import FromTheRun, Table


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    return ready.run(tmp_path / "r1", llama_folder, count=12)


def test_what_is_written_is_read(run: Run) -> None:
    assert read_manifest(run.root) == run.manifest
    assert run.manifest.plan is not None
    text = (run.root / NAME).read_text()
    assert text.startswith("schema = 1\n")
    assert "[plan.estimates.memory]" in text


def test_a_run_is_made_once(run: Run) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        Run.create(run.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema = 1", "schema = 2"), "schema 2"),
        (("schema = 1", "schema = true"), "no valid `schema`"),
        (("schema = 1", ""), "no valid `schema`"),
        (("[plan]", "[plan]\nspeed = 3"), "plan.speed"),
        (("pack_length = 64", 'pack_length = "long"'), "plan.pack_length"),
        (("[plan]", "[plan"), "is broken"),
        (('source = "', 'source = "\\u0000'), "model.source: holds a zero byte"),
    ],
)
def test_a_manifest_that_does_not_hold_is_named(run: Run, change: tuple[str, str], message: str) -> None:
    path = run.root / NAME
    path.write_text(path.read_text().replace(*change, 1))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message) as caught:
        Run.open(run.root)
    assert caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_accumulation", 0), ("seed", -1), ("beta1", 1.0), ("epsilon", 0.0), ("warmup_steps", -3),
        ("learning_rate", 0.0), ("steps", 0), ("keep", 0), ("max_grad_norm", 0.0), ("min_lr_fraction", 1.5),
    ],
)  # fmt: skip
def test_a_plan_edited_to_values_that_mean_nothing_is_named(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        PlanTable.model_validate(ready.plan().model_dump() | {key: value})


def test_every_problem_is_named_at_once(run: Run) -> None:
    path = run.root / NAME
    path.write_text(path.read_text().replace("[plan]", "[plan]\nspeed = 3", 1).replace("epochs = 2", 'epochs = "x"', 1))
    with pytest.raises(UsageError) as caught:
        Run.open(run.root)
    assert "plan.speed" in caught.value.message
    assert "plan.epochs" in caught.value.message


def test_bytes_that_are_not_utf8_are_named(run: Run) -> None:
    (run.root / NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8") as caught:
        Run.open(run.root)
    assert caught.value.hint


def test_an_older_schema_is_migrated_a_version_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SCHEMA", 3)
    monkeypatch.setitem(store.MIGRATIONS, 1, lambda values: values | {"seen": [1]})
    monkeypatch.setitem(store.MIGRATIONS, 2, lambda values: values | {"seen": [*values["seen"], 2]})
    values = store.migrate({"schema": 1}, run.root / NAME)
    assert values == {"schema": 3, "seen": [1, 2]}


def test_a_change_that_does_not_hold_leaves_the_file(run: Run) -> None:
    before = (run.root / NAME).read_bytes()

    def spoil() -> None:
        with run.edit() as manifest:
            assert manifest.plan
            manifest.plan.epochs = "many"  # type: ignore[assignment]  # what the schema must refuse

    with pytest.raises(ValueError, match="epochs"):
        spoil()
    assert (run.root / NAME).read_bytes() == before
    assert not list(run.root.glob(".run.toml.*"))


def test_two_writers_lose_nothing(run: Run) -> None:
    script = (
        "import sys; from pathlib import Path; from sparkctl.manifest.store import Run, now\n"
        "from sparkctl.manifest.schema import Resume\n"
        "run = Run.open(Path(sys.argv[1]))\n"
        "for i in range(25):\n"
        "    with run.edit() as m: m.resumes = [*m.resumes, Resume(step=i, reason='t', when=now())]\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(run.root)]) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(read_manifest(run.root).resumes) == 50


def test_a_running_step_is_told_from_a_killed_one(run: Run) -> None:
    with holding.training(run.root) as process:
        assert run.running() == "train"
        with (
            pytest.raises(SparkError, match=f"`train` is running .process {process.pid}.") as caught,
            run.step("merge"),
        ):
            pass
        assert caught.value.hint
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while run.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.running() is None
    with run.step("merge"):
        assert run.running() == "merge"


def test_paths_hold_after_a_move(run: Run, tmp_path: Path, llama_folder: Path) -> None:
    """The run moved elsewhere finds its model where it was; moved together with it, where it is now."""
    assert run.manifest.model
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = Run.open(Path(shutil.move(run.root, tmp_path / "deep" / "er" / "r1")))
    assert moved.manifest.model
    assert moved.resolve(moved.manifest.model.source) == Path(os.path.normpath(llama_folder))
    with moved.edit():
        pass
    assert moved.manifest.run.folder == str(moved.root)


def test_what_lies_within_a_copied_run_is_its_own(run: Run, tmp_path: Path) -> None:
    """The original is still there, and may hold another result by now: what the copy lacks is not taken from it."""
    (run.root / "merged").mkdir()
    (run.root / "out..").mkdir()
    copy = Run.open(Path(shutil.copytree(run.root, tmp_path / "deep" / "copy")))
    assert copy.resolve("merged") == copy.root / "merged"
    (copy.root / "merged").rmdir()
    (copy.root / "out..").rmdir()
    assert copy.resolve("merged") == copy.root / "merged"
    assert copy.resolve("out..") == copy.root / "out.."
    (tmp_path / "beside").mkdir()
    assert copy.resolve("../beside") == tmp_path / "beside"


def test_an_edit_after_a_move_writes_paths_as_they_are_now(run: Run, tmp_path: Path, llama_folder: Path) -> None:
    """Twice: the second edit has nothing left to go by but what the first wrote."""
    recipe, data = tmp_path / "mine.toml", tmp_path / "chats.jsonl"
    recipe.write_text("epochs = 3\n")
    data.write_text("{}\n")
    parent = Run.create(tmp_path / "r0")
    for name in ("out", "out-adapter", "out-before"):
        (tmp_path / name).mkdir()
    merged = MergeTable(
        checkpoint="c", folder="../out", tensors=1, changed_tensors=1, bytes=1, seconds=1, created="x", made_from="x"
    )
    with run.edit() as manifest:
        assert manifest.data
        assert manifest.plan
        manifest.run.parent = "../r0"
        manifest.data.files = [DataFile(path="../chats.jsonl", sha256="x", size=1, mtime_ns=1, examples=1)]
        manifest.data.recipe = manifest.plan.recipe = "../mine.toml"
        manifest.merge, manifest.adapter = merged, merged.model_copy(update={"folder": "../out-adapter"})
        manifest.merge.others = [MergedFolder(**merged.model_dump(exclude={"others"}) | {"folder": "../out-before"})]
        inside = Checkpoint(id="s", kind="step", path="checkpoints/s", created="x", digest="x")
        manifest.checkpoints = [*manifest.checkpoints, inside]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = Run.open(Path(shutil.move(run.root, tmp_path / "deep" / "er" / "r1")))
    for _ in range(2):
        with moved.edit():
            pass
    manifest = read_manifest(moved.root)
    assert manifest.run.folder == str(moved.root)
    assert manifest.model and manifest.data and manifest.plan and manifest.merge and manifest.adapter  # noqa: PT018
    assert manifest.merge.others
    where = {
        manifest.model.source: llama_folder, str(manifest.run.parent): parent.root, manifest.data.files[0].path: data,
        str(manifest.data.recipe): recipe, str(manifest.plan.recipe): recipe,
        manifest.merge.others[0].folder: tmp_path / "out-before",
        manifest.merge.folder: tmp_path / "out", manifest.adapter.folder: tmp_path / "out-adapter",
        manifest.checkpoints[0].path: llama_folder,
    }  # fmt: skip
    for path, meant in where.items():
        assert not Path(path).is_absolute()
        assert Path(os.path.normpath(moved.root / path)) == meant
    assert manifest.checkpoints[1].path == "checkpoints/s"


NO_PATHS = {"RunTable.folder", "Checkpoint.parent"}  # absolute; an id


def test_every_key_that_leads_out_of_a_run_is_known_as_such() -> None:
    """One that is not would be wrong after a move, and nobody would say so."""
    names = {"path", "folder", "source", "recipe", "parent", "model"}
    tables = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, Table)]
    texts = {
        f"{table.__name__}.{key}": field
        for table in tables
        for key, field in table.model_fields.items()
        if key in names and field.annotation in (str, str | None)
    }
    unmarked = {name for name, field in texts.items() if not any(isinstance(m, FromTheRun) for m in field.metadata)}
    assert len(texts) > 12
    assert unmarked <= NO_PATHS


def test_names_are_no_paths(run: Run, tmp_path: Path) -> None:
    """A hub id and a shipped recipe stay what they are, also beside folders of those names."""
    with run.edit() as manifest:
        assert manifest.data
        assert manifest.model
        manifest.model.source, manifest.model.revision = "Org/Name", "c" * 40
        manifest.data.recipe = "qwen3.5-0.8b-lora"
    moved = Run.open(Path(shutil.move(run.root, tmp_path / "elsewhere")))
    assert moved.manifest.model == run.manifest.model
    assert moved.manifest.data == run.manifest.data


def test_of_two_that_make_a_run_one_does(run: Run, tmp_path: Path) -> None:
    """The second waits for the first's lock, and must not write over what it finds then."""
    folder = tmp_path / "new"
    folder.mkdir()
    with ThreadPoolExecutor() as pool:
        with FileLock(folder / ".manifest.lock"):
            second = pool.submit(Run.create, folder)
            time.sleep(0.2)
            shutil.copy(run.root / NAME, folder / NAME)
        with pytest.raises(UsageError, match="holds a run already"):
            second.result(timeout=30)
    assert read_manifest(folder).run.id == run.manifest.run.id


def test_a_full_disk_is_named_and_leaves_no_folder(small_disk: Path) -> None:
    (small_disk / "there").mkdir()
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    for folder in (small_disk / "new", small_disk / "there"):
        with pytest.raises(OSError, match="No space") as caught:
            Run.create(folder)
        assert caught.value.filename == str(folder / NAME)
    assert sorted(path.name for path in small_disk.rglob("*")) == ["filler", "there"]
