"""Fixtures that several folders use; the makers of models and data are in tests/tiny.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models threads only wait for each other


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
