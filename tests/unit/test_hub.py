"""Models of the hub, against a server of our own: what is fetched, when, and what is not fetched again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hub_server
import pytest
import ready
from hub_server import SHARD_BYTES, SHARDS, SMALL, HubServer

from sparkctl.model.hub import ModelSource, locate

ID = "org/tiny"


class Counter:
    """A progress that counts."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float | None, str]] = []
        self.done = 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Counter]:
        self.tasks.append((description, total, unit))
        yield self

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is served; its weights are no weights."""
    return hub_server.repository(tmp_path / "repository")


@pytest.fixture
def commit(hub: HubServer, folder: Path) -> str:
    """The commit under which `folder` is served."""
    return hub.publish(ID, folder)


def names(source: ModelSource) -> set[str]:
    """Files that are there."""
    return {str(path.relative_to(source.folder)) for path in source.folder.rglob("*") if path.is_file()}


def test_the_newest_commit_without_weights(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    source = locate(ID)
    assert (source.source, source.revision, source.is_hub) == (ID, commit, True)
    assert source.folder.is_relative_to(tmp_path / "hf" / "hub")
    assert names(source) == SMALL
    assert (source.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_recorded_commit_is_found_without_the_network(hub: HubServer, commit: str) -> None:
    source = locate(ID)
    hub.requests.clear()
    assert locate(ID, revision=commit) == source
    assert hub.requests == []


def test_weights_come_when_asked_for_and_once(hub: HubServer, commit: str, folder: Path) -> None:
    progress = Counter()
    source = locate(ID, revision=commit, weights=True, progress=progress)
    assert names(source) == SMALL | {*SHARDS}
    for shard in SHARDS:
        assert (source.folder / shard).read_bytes() == (folder / shard).read_bytes()
    assert progress.tasks == [(f"downloading {ID}", 2 * SHARD_BYTES, "B")]
    assert progress.done == 2 * SHARD_BYTES
    hub.requests.clear()
    assert locate(ID, revision=commit, weights=True, progress=progress) == source
    assert hub.requests == []
    assert len(progress.tasks) == 1


def test_only_what_is_missing_is_downloaded(hub: HubServer, commit: str) -> None:
    source = locate(ID, weights=True)
    (source.folder / SHARDS[0]).unlink()
    for blob in (source.folder.parents[1] / "blobs").iterdir():  # the shard's blob is the one that nothing names
        if not any(path.resolve() == blob for path in source.folder.iterdir()):
            blob.unlink()
    progress = Counter()
    hub.requests.clear()
    assert names(locate(ID, revision=commit, weights=True, progress=progress)) == SMALL | {*SHARDS}
    assert progress.tasks[0][1] == progress.done == SHARD_BYTES
    assert not any(SHARDS[1] in line for line in hub.requests)


def test_one_file_of_weights_has_no_index(hub: HubServer, tmp_path: Path) -> None:
    made = tmp_path / "single"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"x" * 100)
    (made / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("org/single", made)
    assert names(locate("org/single", weights=True)) == {"config.json", "model.safetensors"}


def test_a_newer_commit_leaves_the_recorded_one(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(folder, tmp_path / "newer"))
    (newer / "config.json").write_text('{"newer": true}')
    newest = hub.publish(ID, newer)
    assert locate(ID).revision == newest != commit
    assert json.loads((locate(ID, revision=commit).folder / "config.json").read_text()) == {"of": "config.json"}


def test_a_broken_connection_is_continued(hub: HubServer, commit: str, folder: Path) -> None:
    hub.fail(f"GET /{ID}/resolve/{commit}/{SHARDS[0]}", cut=SHARD_BYTES // 3, times=1)
    progress = Counter()
    source = locate(ID, weights=True, progress=progress)
    assert (source.folder / SHARDS[0]).read_bytes() == (folder / SHARDS[0]).read_bytes()
    assert sum(f"GET /{ID}/resolve/{commit}/{SHARDS[0]}" in line for line in hub.requests) == 2
    assert progress.done == 2 * SHARD_BYTES


def test_nothing_is_said_and_nothing_slow_is_loaded(hub: HubServer, commit: str, tmp_path: Path) -> None:
    """Bars, warnings about tokens and retries: all huggingface_hub's own."""
    hub.fail(f"GET /{ID}/resolve/{commit}/{SHARDS[0]}", cut=SHARD_BYTES // 3, times=1)
    script = (
        "import sys; from sparkctl.model.hub import locate; locate('org/tiny', weights=True); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_token_goes_to_the_hub(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert names(locate(ID, weights=True)) == SMALL | {*SHARDS}
    assert hub.tokens == {"Bearer hf_secret"}


def test_offline_what_is_cached_is_used(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = locate(ID, weights=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert locate(ID, weights=True) == before
    assert locate(ID, revision=commit, weights=True) == before
    assert hub.requests == []


def test_folders(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative to here, relative to a run, and where the run was before it moved."""
    assert locate(str(llama_folder)) == ModelSource(str(llama_folder), llama_folder, None, is_hub=False)
    assert locate(str(llama_folder), weights=True).folder == llama_folder
    monkeypatch.chdir(llama_folder.parent)
    assert locate(llama_folder.name).folder.samefile(llama_folder)
    (tmp_path / "a").mkdir()
    run = ready.run(tmp_path / "a" / "r1", llama_folder)
    assert run.manifest.model
    source = run.manifest.model.source
    assert locate(source, base=run.root).folder.samefile(llama_folder)
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    moved = Path(shutil.move(run.root, tmp_path / "elsewhere" / "deeper" / "r1"))
    assert not (moved / source).exists()
    assert locate(source, base=moved).folder.samefile(llama_folder)
