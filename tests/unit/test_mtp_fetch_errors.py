"""What is said where a head cannot be had; nothing half-fetched gets the head's name, and no message the token."""

from __future__ import annotations

import json
import os
import re
import shutil
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import heads
import pytest
from heads import WANTED
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError, UsageError, system_error
from sparkctl.model.download import sentence
from sparkctl.model.ranges import PATIENCE, TRIES
from sparkctl.model.weights import INDEX, SINGLE
from sparkctl.mtp.fetch import find_head
from sparkctl.mtp.source import NoHead
from sparkctl.progress import silent

ID, SECRET = "org/tiny", "hf_secret"


@pytest.fixture
def folder(qwen35_folder: Path, tmp_path: Path) -> Path:
    """What is served; it may be changed before it is published."""
    return heads.rebuilt(qwen35_folder, tmp_path / "served", 1)


@pytest.fixture
def commit(hub: HubServer, folder: Path) -> str:
    return hub.publish(ID, folder)


def refused(tmp_path: Path, source: str = ID) -> SparkError:
    """The error; no head is in the cache, and the token is nowhere in it."""
    with pytest.raises(SparkError) as raised:
        find_head(source, WANTED)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert SECRET not in str(raised.value.hint)
    assert not list((tmp_path / "cache").rglob("head.safetensors"))
    return raised.value


BYTES = f"GET /{ID}/resolve/"
REFUSALS: list[tuple[dict[str, Any], int, str, str]] = [
    (dict(status=401), 1, "refuses access to `org/tiny` (HTTP 401)", "HF_TOKEN"),
    (dict(status=403, code="GatedRepo"), 1, "is gated", "accept its terms"),
    (dict(status=404, code="RepoNotFound"), 2, "no model `org/tiny`", "HF_TOKEN"),
    (dict(status=404, code="EntryNotFound"), 1, "has no `model.safetensors`", "only safetensors"),
    (dict(status=416), 1, "HTTP 416: it has no bytes", "same command again"),
    (dict(status=429), 1, "answered HTTP 429", "wait"),
    (dict(status=403, body=b"refus\xe9"), 1, "does not answer as a hub does", "HF_ENDPOINT"),
    (dict(status=503), 1, "answered HTTP 503", "wait"),
    (dict(cut=0), 1, "broke off", "same command again"),
    (dict(surplus=-10**9), 1, "broke off: the connection closed half way", "same command again"),
    (dict(surplus=7), 1, "more bytes than the", "download the model and name its folder"),
    (dict(said="1-8/1000"), 1, "bytes 1 to 8, and 0 to 7 were asked for", "download the model"),
    (dict(said="0-7/1000"), 1, "a file of 1,000 bytes, and it has", "download the model"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "status", "message", "hint"), REFUSALS)
def test_what_the_hub_refuses(
    fault: dict[str, Any], status: int, message: str, hint: str, hub: HubServer, commit: str, folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fail(f"{BYTES}{commit}/{SINGLE}", **fault)
    error = refused(tmp_path)
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.exit_status == status
    hub.faults.clear()
    assert heads.equal(heads.values(find_head(ID, WANTED)), heads.own(folder))


def test_a_busy_hub_is_asked_again(hub: HubServer, commit: str, folder: Path) -> None:
    for status in (429, 503):
        hub.fail(f"{BYTES}{commit}/{SINGLE}", status=status, body=b"trop occup\xe9", times=TRIES // 2)
    assert heads.equal(heads.values(find_head(ID, WANTED)), heads.own(folder))
    hub.fail(f"{BYTES}{commit}/{SINGLE}", status=401)
    hub.requests.clear()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    with pytest.raises(SparkError):
        find_head(ID, WANTED)
    assert len([line for line in hub.requests if SINGLE in line]) == 1  # no is no


class Said:
    """Progress that remembers its lines."""

    task = staticmethod(silent.task)

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_password_in_the_endpoint_is_not_told(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", f"//me:{SECRET}@"))
    hub.fail(f"{BYTES}{commit}/{SINGLE}", status=503, times=2)
    progress = Said()
    assert heads.equal(heads.values(find_head(ID, WANTED, progress=progress)), heads.own(folder))
    assert progress.lines == [f"`{ID}/{SINGLE}`: HTTP 503; asking again"] * 2
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    hub.fail(f"{BYTES}{commit}/{SINGLE}", status=503)
    assert "answered HTTP 503" in refused(tmp_path).message


WINDOW = {"RateLimit": '"resolvers";r=0;t=290'}  # as the hub says it, of windows of 300 s


@pytest.mark.parametrize(
    ("headers", "status", "then", "least"),
    [
        ({"Retry-After": "120"}, 503, "asking again in 120 s, as it asks", 120),
        ({"Retry-After": "0"}, 503, "asking again", 1),
        ({"Retry-After": "soon"}, 503, "asking again", 1),
        (WINDOW, 429, "asking again in 290 s, as it asks", 290),
        (WINDOW, 503, "asking again", 1),
    ],
)
def test_a_hub_that_says_how_long_is_asked_no_sooner(
    headers: dict[str, str], status: int, then: str, least: int, hub: HubServer, commit: str, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    hub.fail(f"{BYTES}{commit}/{SINGLE}", status=status, headers=headers, times=1)
    progress = Said()
    assert heads.equal(heads.values(find_head(ID, WANTED, progress=progress)), heads.own(folder))
    assert progress.lines == [f"`{ID}/{SINGLE}`: HTTP {status}; {then}"]
    assert max(slept) == least


def test_a_hub_that_asks_for_too_long_is_not_waited_for(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said how long, as a number even of a date."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2 * PATIENCE), usegmt=True)
    for value in (str(PATIENCE + 1), date):
        hub.fail(f"{BYTES}{commit}/{SINGLE}", status=503, headers={"Retry-After": value})
        error = refused(tmp_path)
        wait = int(re.search(r"answered HTTP 503 for `org/tiny` and asks to wait (\d+) s$", error.message)[1])
        assert wait in ({PATIENCE + 1} if value != date else range(2 * PATIENCE - 60, 2 * PATIENCE + 1))
        assert (error.hint or "").startswith(f"wait {wait} s, then run the same command again")
        hub.faults.clear()
    assert max(slept, default=0) < PATIENCE


@pytest.mark.parametrize("address", [f"http://me:{SECRET}@hub.example/a", f"https://cdn.example/a?Signature={SECRET}"])
def test_no_address_is_told(address: str) -> None:
    error = OSError(f"[Errno 5] Server error '500 Oh' for url '{address}'\nmore")
    assert sentence(error) == "server error '500 Oh' for url …"
    assert sentence(OSError(f"{address} is gone.")) == "… is gone"


def test_the_file_is_replaced_meanwhile(
    hub: HubServer, commit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparkctl.mtp import fetch

    begun = fetch._begun

    def replaced(*arguments: Any) -> int:
        data = bytearray((folder / SINGLE).read_bytes())
        data[-1] ^= 1
        (folder / SINGLE).write_bytes(data)
        return begun(*arguments)

    monkeypatch.setattr(fetch, "_begun", replaced)
    assert "it was replaced meanwhile" in refused(tmp_path).message


@pytest.mark.parametrize("where", ["GET /api/", "HEAD /"])
def test_the_hub_refuses_the_first_question(where: str, hub: HubServer, commit: str, tmp_path: Path) -> None:
    hub.fail(where, status=401)
    assert "HF_TOKEN" in str(refused(tmp_path).hint)


def test_offline_and_never_fetched(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused(tmp_path).message
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.fail(f"{BYTES}{commit}/{SINGLE}", status=500)
    refused(tmp_path)  # config.json is there by now
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        "the MTP head of `org/tiny` was never fetched, and HF_HUB_OFFLINE forbids to fetch it"
        in refused(tmp_path).message
    )


def test_a_disk_that_is_full(
    hub: HubServer, commit: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 12_000))
    with pytest.raises(OSError, match="No space left") as raised:
        find_head(ID, WANTED)
    said = system_error(raised.value)
    assert str(small_disk / "sparkctl") in said.message
    assert "free some space" in (said.hint or "")
    assert not list(small_disk.rglob("head.safetensors"))
    (small_disk / "filler").unlink()
    find_head(ID, WANTED)


def test_a_file_that_is_shorter_than_its_header_says(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-5])
    hub.publish(ID, folder)
    error = refused(tmp_path)
    assert "`org/tiny/model.safetensors` is cut short" in error.message


def test_no_safetensors_file(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).write_bytes(b"not a model" * 1000)
    hub.publish(ID, folder)
    assert "`org/tiny/model.safetensors` is no safetensors file" in refused(tmp_path).message


def changed(folder: Path, **change: Any) -> None:
    """Tensors of the single file replaced, or taken out where None."""
    tensors = load_file(folder / SINGLE) | {name.replace("__", "."): value for name, value in change.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"mtp.fc.weight": None}, "is not whole: it lacks `mtp.fc.weight`"),
    ({"mtp.layers.1.norm.weight": [3]}, "unknown here: `mtp.layers.1.norm.weight`"),
    ({"mtp.fc.weight": [8, 16]}, "has other dimensions than the model: `mtp.fc.weight` [8, 16] for [32, 64]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISFITS)
@pytest.mark.parametrize("local", [True, False])
def test_a_head_that_does_not_fit(
    change: dict[str, Any], message: str, local: bool, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    """Seen before a byte of it is fetched."""
    import torch

    changed(folder, **{name: shape and torch.zeros(shape) for name, shape in change.items()})
    hub.publish(ID, folder)
    assert message in refused(tmp_path, str(folder) if local else ID).message
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_quantised_head(folder: Path, tmp_path: Path) -> None:
    import torch

    changed(folder, **{"mtp.fc.weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn)})
    assert "is quantised: `mtp.fc.weight` in F8_E4M3" in refused(tmp_path, str(folder)).message


@pytest.mark.parametrize("local", [True, False])
def test_a_config_that_promises_two_layers(local: bool, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.publish(ID, heads.configured(folder, mtp_num_hidden_layers=2))
    error = refused(tmp_path, str(folder) if local else ID)
    assert "has 2 layers of MTP head" in error.message
    assert not isinstance(error, NoHead)


@pytest.mark.parametrize("local", [True, False])
def test_a_model_without_a_head(local: bool, hub: HubServer, folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    """By its config, by its tensors, by its index, by its kind."""
    lost = Path(shutil.copytree(folder, tmp_path / "lost"))
    changed(lost, **dict.fromkeys(WANTED))
    indexed = Path(shutil.copytree(lost, tmp_path / "indexed"))
    (indexed / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(lost / SINGLE), SINGLE)}))
    silent = heads.configured(Path(shutil.copytree(folder, tmp_path / "silent")), mtp_num_hidden_layers=0)
    for number, model in enumerate((lost, indexed, silent, llama_folder)):
        hub.publish(f"org/none{number}", model)
        error = refused(tmp_path, str(model) if local else f"org/none{number}")
        assert isinstance(error, NoHead), error


def test_an_index_that_names_a_missing_shard(hub: HubServer, qwen35_folder: Path, tmp_path: Path) -> None:
    model = heads.rebuilt(qwen35_folder, tmp_path / "three", 3)
    missing = sorted(model.glob("*.safetensors"))[1]
    missing.unlink()
    hub.publish(ID, model)
    assert f"has no `{missing.name}`" in refused(tmp_path).message
    assert f"`{missing}`, which the index names, is missing" in refused(tmp_path, str(model)).message


def test_what_is_neither_a_folder_nor_an_id(hub: HubServer, tmp_path: Path) -> None:
    assert isinstance(refused(tmp_path, "no-such-folder"), UsageError)
    assert hub.requests == []
