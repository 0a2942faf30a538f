"""Fixtures that several folders use; the makers of models and data are in tests/tiny.py."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pytest
import tiny
from hub_server import HubServer

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models threads only wait for each other


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for what it starts with `&`; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is no measurement of the user's machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKCTL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def qwen35_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal Qwen3.5. Read only: copy it before changing a file."""
    return tiny.qwen35(tmp_path_factory.mktemp("qwen35"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama. Read only."""
    return tiny.dense(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Make a folder a real read-only mount of itself, until the test's end; others may still write what lies under."""
    mounted: list[Path] = []

    def make(folder: Path) -> None:
        if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
            pytest.skip("mounting a folder is not permitted here")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of this test's own, and an empty cache. Waits between tries are left out."""
    for name in hub_server.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read at its import, as the next two
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # it would ask the real hub
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with hub_server.hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
