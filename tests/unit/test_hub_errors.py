"""What is said where a model cannot be had, and that nothing is left half-done; no message holds the token."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import SHARDS, SMALL, HubServer

from sparkctl.errors import SparkError, UsageError, system_error
from sparkctl.model.download import Hub
from sparkctl.model.hub import ModelSource, is_hub_id, locate
from sparkctl.model.token import keep_token

ID, SECRET = "org/tiny", "hf_secret"


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


def refused(*arguments: str, revision: str | None = None, weights: bool = False) -> SparkError:
    """The error that `locate` ends in; nothing in it or behind it holds the token."""
    with pytest.raises(SparkError) as raised:
        locate(*arguments, revision=revision, weights=weights)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert SECRET not in str(raised.value.hint)
    assert raised.value.hint
    return raised.value


REFUSALS = [
    (dict(status=404, code="RepoNotFound"), 2, "no model `org/tiny`", "HF_TOKEN"),
    (dict(status=401, code="RepoNotFound"), 2, "no model `org/tiny`", "HF_TOKEN"),
    (dict(status=403, code="GatedRepo"), 1, "is gated", "accept its terms at"),
    (dict(status=401, code="GatedRepo"), 1, "is gated", "HF_TOKEN"),
    (dict(status=401), 1, "refuses access to `org/tiny` (HTTP 401)", "HF_TOKEN"),
    (dict(status=403), 1, "refuses access to `org/tiny` (HTTP 403)", "HF_TOKEN"),
    (dict(status=429), 1, "answered HTTP 429", "wait"),
    (dict(status=429, headers={"Retry-After": "40"}), 1, "for `org/tiny` and asks to wait 40 s", "wait 40 s, then run"),
    (dict(status=500), 1, "answered HTTP 500", "wait"),
    (dict(status=503), 1, "answered HTTP 503", "wait"),
    (dict(page=True), 1, "does not answer as a hub does", "HF_ENDPOINT"),
]
# at the first question, at a file's head and at its bytes, where a page has another size than the file
PLACES = [(where, *refusal) for where in ("GET /api/", "HEAD /", "GET /org/") for refusal in REFUSALS][:-1]


@pytest.mark.parametrize(("where", "fault", "status", "message", "hint"), PLACES)
def test_what_the_hub_refuses(
    where: str, fault: dict[str, Any], status: int, message: str, hint: str, hub: HubServer, commit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fail(where, **fault)
    error = refused(ID)
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.exit_status == status
    hub.faults.clear()
    assert names(locate(ID)) == SMALL


@pytest.mark.parametrize("where", ["GET /api/", "GET /org/"])
def test_a_refusal_that_is_not_in_utf_8(where: str, hub: HubServer, commit: str) -> None:
    """As the page of a proxy may be."""
    hub.fail(where, status=403, body="accès refusé".encode("latin-1"))
    with pytest.raises(SparkError, match="does not answer as a hub does") as raised:
        locate(ID, weights=True)
    assert "HF_ENDPOINT" in (raised.value.hint or "")


def test_a_file_of_another_size_is_no_file(hub: HubServer, commit: str) -> None:
    hub.fail(f"GET /{ID}/resolve/{commit}/tokenizer.json", page=True)
    error = refused(ID)
    assert "broke off: consistency check failed" in error.message
    hub.faults.clear()
    assert names(locate(ID)) == SMALL


def test_a_connection_that_keeps_breaking(hub: HubServer, commit: str) -> None:
    """Nothing half-written stays, and the same command goes on."""
    source = locate(ID)
    hub.fail(f"GET /{ID}/resolve/{commit}/{SHARDS[1]}", cut=0)
    error = refused(ID, revision=commit, weights=True)
    assert f"the download of `{ID}` broke off" in error.message
    assert "same command again" in (error.hint or "")
    assert names(source) == SMALL | {SHARDS[0]}
    assert not list((source.folder.parents[1] / "blobs").glob("*.incomplete"))
    hub.faults.clear()
    hub.requests.clear()
    assert names(locate(ID, revision=commit, weights=True)) == SMALL | {*SHARDS}
    assert not any(SHARDS[0] in line for line in hub.requests)


def test_a_revision_that_is_gone(hub: HubServer, commit: str) -> None:
    error = refused(ID, revision="0" * 40)
    assert f"`{ID}` has no revision `{'0' * 40}`" in error.message


def test_a_model_without_safetensors(hub: HubServer, folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    hub.publish("org/pickled", folder)
    error = refused("org/pickled", weights=True)
    assert "has no `model.safetensors`" in error.message
    assert "only safetensors" in (error.hint or "")
    assert not any(".bin" in line for line in hub.requests)


def test_an_index_that_is_broken(hub: HubServer, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    hub.publish("org/broken", folder)
    assert "model.safetensors.index.json` is broken" in refused("org/broken", weights=True).message


def test_nobody_listens(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"http://user:{SECRET}@127.0.0.1:{hub_server.free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    for revision in (None, commit):
        error = refused(ID, revision=revision)
        assert error.message.startswith(f"`{ID}` is no folder here, ")
        assert f"cannot reach `{nowhere.replace(f'user:{SECRET}@', '')}`: connection refused" in error.message
        assert "HF_HUB_OFFLINE=1" in (error.hint or "")


def test_offline_and_not_cached(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for revision in (None, commit):
        error = refused(ID, revision=revision)
        assert "HF_HUB_OFFLINE forbids" in error.message
        assert "unset HF_HUB_OFFLINE" in (error.hint or "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    source = locate(ID)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused(ID, weights=True).message
    (source.folder / "tokenizer.json").unlink()
    assert "as a whole" in refused(ID, revision=commit).message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_ENDPOINT", "the hub", "HF_ENDPOINT is no address: `the hub`"),
        ("HF_ENDPOINT", "ftp://127.0.0.1", "HF_ENDPOINT is no address"),
        ("HF_TOKEN", f"{SECRET}é", "characters that no token has"),
        ("HF_TOKEN", f"{SECRET}\x0bx", "characters that no token has"),
    ],
)
def test_settings_that_cannot_be(
    variable: str, value: str, message: str, hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    error = refused(ID)
    assert isinstance(error, UsageError)
    assert message in error.message
    assert variable in error.message + str(error.hint)


def test_a_disk_that_is_full(hub: HubServer, folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before the download, and when it fills up meanwhile."""
    (folder / SHARDS[0]).write_bytes(os.urandom(3_000_000))
    commit = hub.publish(ID, folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk / "cache"))
    source = locate(ID)
    before = refused(ID, revision=commit, weights=True)
    assert "take 3.4 MB" in before.message
    assert str(small_disk) in before.message
    monkeypatch.setattr(Hub, "_require_space", lambda self, size: None)
    error = refused(ID, revision=commit, weights=True)
    assert f"no space left in `{small_disk / 'cache'}`" in error.message
    assert "HF_HUB_CACHE" in (error.hint or "")
    assert names(source) == SMALL
    assert not list(small_disk.rglob("*.incomplete"))


def test_a_cache_that_may_not_be_written(hub: HubServer, commit: str, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(OSError, match=str(tmp_path / "hf")) as raised:
        locate(ID)
    said = system_error(raised.value)
    assert str(tmp_path / "hf") in said.message
    assert said.message.startswith(("not a directory", "file exists"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", "no folder `no-such-model`"),
        ("./models/mine", "no folder"),
        ("/models/mine", "no folder"),
        ("a/b/c", "no folder"),
        ("../mine", "no folder"),
        ("", "is a folder"),
        ("org/", "no folder"),
        ("org/a b", "no folder"),
        (f"org/{'x' * 100}", "no folder"),
    ],
)
def test_what_is_neither_a_folder_nor_an_id(source: str, message: str, hub: HubServer) -> None:
    if source:
        error = refused(source)
        assert isinstance(error, UsageError)
        assert message in error.message
    assert hub.requests == []
    assert not is_hub_id(source)


def test_a_recorded_folder_that_is_gone_is_not_asked_for(hub: HubServer, tmp_path: Path) -> None:
    """Its name may look like an id, which is no business of the hub's."""
    with pytest.raises(UsageError, match="no folder"):
        locate("models/mine", base=tmp_path)
    assert hub.requests == []


def test_a_file_and_a_folder_without_weights(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "is a file" in refused(str(tmp_path / "model.gguf")).message
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)).folder == tmp_path
    assert "no safetensors" in refused(str(tmp_path), weights=True).message


def test_offline_nothing_is_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our client, which keeps the token from other hosts, does what huggingface_hub's own does at each request too."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    keep_token(hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.OfflineModeIsEnabled):
        huggingface_hub.get_session().get(hub.url)
