"""The head of a hub model: only its bytes are fetched, a broken fetch goes on, nothing is fetched twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import heads
import httpx
import hub_server
import pytest
from heads import WANTED
from hub_server import HubServer

from sparkctl.errors import SparkError
from sparkctl.model.hub import SINGLE, locate
from sparkctl.model.token import same_address
from sparkctl.mtp import fetch
from sparkctl.mtp.fetch import find_head
from sparkctl.mtp.source import HeadSource

ID, SECRET = "org/tiny", "hf_secret"
KEPT = ["head.safetensors", "head.sha256"]
HEAD_BYTES = sum(2 * tensor.numel() for tensor in heads.tiny.mtp_tensors(**heads.SIZES, seed=0).values())


class Bar:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float | None, str]] = []
        self.steps: list[float] = []
        self.said: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Bar]:
        self.tasks.append((description, total, unit))
        yield self

    def advance(self, amount: float = 1) -> None:
        self.steps.append(amount)

    def note(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(params=[1, 3])
def folder(request: pytest.FixtureRequest, qwen35_folder: Path, tmp_path: Path) -> Path:
    """A model in one file, and in three, its head among the other tensors."""
    return heads.rebuilt(qwen35_folder, tmp_path / "served", request.param)


@pytest.fixture
def commit(hub: HubServer, folder: Path) -> str:
    """The commit under which it is served."""
    return hub.publish(ID, folder)


def fetched(progress: Bar | None = None) -> HeadSource:
    return find_head(ID, WANTED, progress=progress or Bar())


def cached(tmp_path: Path) -> list[str]:
    """What lies in the user's cache, but for locks."""
    folder = tmp_path / "cache" / "sparkctl" / "mtp"
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def parts_asked(hub: HubServer) -> list[str]:
    return [line for line in hub.requests if line.startswith("GET") and "safetensors" in line and "index" not in line]


def weights(commit: str, folder: Path) -> str:
    """What requests for a shard begin with, and those for the index do not."""
    return f"GET /{ID}/resolve/{commit}/{min(folder.glob('model*.safetensors')).name[:7]}"


def twice(hub: HubServer) -> list[tuple[str, int, int]]:
    """Parts of which a byte was sent before."""
    parts = sorted(part for part in hub.parts if part[1] < part[2])
    return [part for before, part in pairwise(parts) if part[0] == before[0] and part[1] < before[2]]


def test_only_config_index_and_the_heads_bytes_are_fetched(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path
) -> None:
    bar = Bar()
    head = fetched(bar)
    assert head.origin == ID
    assert heads.equal(heads.values(head), heads.own(folder))
    assert bar.tasks == [(f"fetching the MTP head of {ID}", HEAD_BYTES, "B")]
    assert sum(bar.steps) == HEAD_BYTES
    assert twice(hub) == []
    asked = {line.split("/")[-1] for line in hub.requests if "/resolve/" in line and line.startswith("GET")}
    assert {name for name in asked if "safetensors" not in name} == {"config.json"}
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    headers = sum(len(heads.merging.raw(path).header) for path in folder.glob("*.safetensors"))
    small = sum((folder / name).stat().st_size for name in asked if name == "config.json" or "index" in name)
    listings = 8 * 1024
    assert HEAD_BYTES + headers < hub.sent < HEAD_BYTES + headers + small + listings < shards
    assert cached(tmp_path) == KEPT


def test_the_digest_is_of_the_head_wherever_it_lies(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    head = fetched()
    assert head.digest() == find_head(str(folder), WANTED).digest()
    other = heads.head_file(tmp_path / "other.safetensors", seed=9)
    assert head.digest() != fetch.from_file(other, WANTED).digest()


def test_a_second_call_asks_for_the_commit_alone(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = heads.values(fetched())
    hub.requests.clear()
    assert heads.equal(heads.values(fetched()), before)
    assert hub.requests == [f"GET /api/models/{ID}/revision/main"]
    hub.requests.clear()
    find_head(ID, WANTED, revision=commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert heads.equal(heads.values(fetched()), before)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["bytes", "cut", "no digest", "other digest"])
def test_what_is_damaged_in_the_cache_is_fetched_anew(
    damage: str, hub: HubServer, commit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched()
    kept = next((tmp_path / "cache").rglob(fetch.HEAD))
    data = kept.read_bytes()
    if "digest" in damage:
        kept.with_name(fetch.DIGEST).unlink()
        if damage == "other digest":
            kept.with_name(fetch.DIGEST).write_bytes(b"\xff")
    else:
        kept.write_bytes(data[:-100] + (bytes(100) if damage == "bytes" else b""))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state = "has no digest beside it in the cache" if damage == "no digest" else "is damaged in the cache"
    with pytest.raises(SparkError, match=f"{state}, and HF_HUB_OFFLINE forbids"):
        fetched()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    bar = Bar()
    assert heads.equal(heads.values(fetched(bar)), heads.own(folder))
    assert bar.said == [f"the MTP head of `{ID}` {state}: fetching it anew"]
    assert kept.read_bytes() == data
    hub.parts.clear()
    fetched()
    assert hub.parts == []


def test_a_look_fetches_headers_alone(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    looked = find_head(ID, WANTED, look=True)
    assert (looked.bytes, looked.tensors, looked.digest(), looked.revision) == (HEAD_BYTES, {}, "", commit)
    assert sum(stop - start for _, start, stop in hub.parts) == sum(
        len(heads.merging.raw(path).header) for path in folder.glob("*.safetensors")
    )
    assert cached(tmp_path) == []
    hub.fail("GET /org/", whole=True)
    bar = Bar()
    assert find_head(ID, WANTED, look=True, progress=bar).bytes == HEAD_BYTES
    shards = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
    unknown = "nothing was downloaded, so whether the head fits is not known"
    assert (bar.tasks, bar.said) == ([], [f"`{hub.url}` sends whole files only: {shards}; {unknown}"])
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    hub.faults.clear()
    fetched()
    assert find_head(ID, WANTED, look=True).digest() == fetched().digest()


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2)])
def test_a_look_at_a_hub_that_sends_whole_files_knows_the_dtype(
    dtype: str, each: int, hub: HubServer, folder: Path
) -> None:
    hub.publish(ID, heads.configured(folder, dtype=dtype))
    hub.fail("GET /org/", whole=True)
    assert find_head(ID, WANTED, look=True).bytes == each * HEAD_BYTES // 2


def test_a_whole_shard_has_the_digest_that_the_hub_lists(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path
) -> None:
    hub.lists_digests = True
    hub.fail(weights(commit, folder), whole=True, damaged=True)
    with pytest.raises(SparkError, match=r"safetensors` came with other bytes than the hub lists") as raised:
        fetched()
    assert "same command again" in str(raised.value.hint)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    hub.faults.clear()
    hub.fail("GET /org/", whole=True)
    assert heads.equal(heads.values(fetched()), heads.own(folder))


def test_a_newer_commit_is_fetched(hub: HubServer, commit: str, tmp_path: Path) -> None:
    fetched()
    other = heads.tiny.qwen35(tmp_path / "other", seed=8)
    hub.publish(ID, other)
    assert heads.equal(heads.values(fetched()), heads.own(other))


def test_shards_that_are_there_are_read(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    locate(ID, weights=True)
    hub.requests.clear()
    assert heads.equal(heads.values(fetched()), heads.own(folder))
    assert parts_asked(hub) == []
    assert cached(tmp_path) == []


@pytest.mark.parametrize("cut", [700, 1500, 4000])
def test_a_connection_that_breaks_is_taken_up(cut: int, hub: HubServer, commit: str, folder: Path) -> None:
    """Where it broke, however often it breaks: no byte is sent twice, and each break is said."""
    hub.fail(weights(commit, folder), cut=cut)
    bar = Bar()
    assert heads.equal(heads.values(fetched(bar)), heads.own(folder))
    assert twice(hub) == []
    assert sum(bar.steps) == HEAD_BYTES
    broken = len([part for part in hub.parts if part[2] - part[1] == cut])
    assert broken > 0
    assert len(bar.said) >= broken
    assert {line.rpartition("; ")[2] for line in bar.said} == {"asking again"}


def test_a_byte_that_is_sent_twice_is_seen(hub: HubServer) -> None:
    hub.parts += [("a", 8, 20), ("a", 0, 8), ("b", 0, 5), ("a", 20, 20), ("a", 20, 21)]
    assert twice(hub) == []
    hub.parts.append(("a", 19, 20))
    assert twice(hub) == [("a", 19, 20)]


KILLED = """
import os, signal, sys, time
from heads import WANTED
from sparkctl.mtp.fetch import find_head
from test_mtp_fetch import Bar

class Deadly(Bar):
    def advance(self, amount=1):
        super().advance(amount)
        if sum(self.steps) > 20_000:
            os.kill(os.getpid(), signal.SIGKILL)

time.sleep = lambda seconds: None
find_head(sys.argv[1], WANTED, progress=Deadly())
"""


def test_a_fetch_that_was_killed_goes_on_in_another_process(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had come is kept under another name, and not asked for again."""
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests / 'unit'}")
    hub.fail(weights(commit, folder), cut=3000)
    killed = subprocess.run([sys.executable, "-c", KILLED, ID], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cached(tmp_path) == [fetch.PARTIAL]
    hub.faults.clear()
    bar = Bar()
    assert heads.equal(heads.values(fetched(bar)), heads.own(folder))
    assert 10_000 < bar.steps[0] < HEAD_BYTES
    assert sum(bar.steps) == HEAD_BYTES
    assert cached(tmp_path) == KEPT


def test_a_part_of_other_files_is_not_gone_on_with(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    fetched()
    kept = next((tmp_path / "cache").rglob("head.safetensors"))
    data = bytearray(kept.read_bytes()[:-3000])
    kept.unlink()
    for damage in (b"another etag", b"", None):
        if damage is None:
            kept.with_name(fetch.PARTIAL).write_bytes(bytes(data) + bytes(9000))  # longer than the head
        else:
            at = data.find(b"etag ")
            kept.with_name(fetch.PARTIAL).write_bytes(data[:at] + damage + data[at + len(damage) :] if damage else b"")
        bar = Bar()
        assert heads.equal(heads.values(fetched(bar)), heads.own(folder))
        assert bar.steps[0] == 0
        kept.unlink()


def test_a_server_without_ranges_gives_whole_shards(hub: HubServer, commit: str, folder: Path, tmp_path: Path) -> None:
    hub.fail("GET /org/", whole=True)
    bar = Bar()
    assert heads.equal(heads.values(fetched(bar)), heads.own(folder))
    assert [task[0] for task in bar.tasks] == [f"downloading {ID}"]
    assert "whole files only" in bar.said[0]
    assert cached(tmp_path) == []
    hub.requests.clear()
    fetched()
    assert parts_asked(hub) == []


@pytest.mark.parametrize("way", ["ranges", "whole shards", "small files", "all weights"])
def test_the_token_goes_to_the_hub_and_nowhere_else(
    way: str, hub: HubServer, commit: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files lie at another address of the same machine, to which the hub sends its callers on."""
    hub.token = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with hub_server.hub() as files:
        files.commits = hub.commits
        hub.weights_at, hub.small_at = files.url, files.url if way == "small files" else None
        if way == "whole shards":
            files.fail("GET /org/", whole=True)
        if way == "all weights":
            locate(ID, weights=True)
        assert heads.equal(heads.values(fetched()), heads.own(folder))
        assert parts_asked(files)
        assert way != "small files" or any("config.json" in line for line in files.requests)
        assert files.tokens == {None}
        assert hub.tokens == {f"Bearer {SECRET}"}


ADDRESSES = [
    ("https://hub.org/a/b", "https://hub.org", True),
    ("https://hub.org:443/a", "https://hub.org/mirror", True),
    ("https://hub.org:8443/a", "https://hub.org", False),
    ("http://hub.org/a", "https://hub.org", False),
    ("https://files.hub.org/a", "https://hub.org", False),
    ("https://hub.org/a", "hub.org:no port", False),
]


@pytest.mark.parametrize(("url", "endpoint", "same"), ADDRESSES)
def test_an_address_is_scheme_host_and_port(url: str, endpoint: str, same: bool) -> None:
    assert same_address(httpx.URL(url), endpoint) is same


def test_only_the_shard_with_the_head_has_to_be_there(qwen35_folder: Path, tmp_path: Path) -> None:
    some = Path(shutil.copytree(qwen35_folder, tmp_path / "some"))
    for path in some.glob("*-of-*.safetensors"):
        path.unlink()
    assert heads.equal(heads.values(find_head(str(some), WANTED)), heads.own(qwen35_folder))
    assert not (some / SINGLE).exists()
