"""Files sealed while others are written: their digests, the disk's word, and an end without delay."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from sparkctl import files
from sparkctl.files import Sealing, sha256_bytes


def test_every_file_has_its_digest_and_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "sync_file", lambda path: synced.append(path.name))
    written = {"a": b"1" * 3_000_000, "b": b"", "c": b"3"}
    with Sealing() as sealing:
        for name, data in written.items():
            (tmp_path / name).write_bytes(data)
            sealing.add(tmp_path / name)
        assert sealing.digests() == {name: sha256_bytes(data) for name, data in written.items()}
        assert sorted(synced) == ["a", "b", "c"]


def test_what_the_disk_refuses_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files, "sync_file", full)
    (tmp_path / "a").write_bytes(b"1")
    with Sealing() as sealing:
        sealing.add(tmp_path / "a")
        with pytest.raises(OSError, match="no space left"):
            sealing.digests()


def test_a_file_that_cannot_be_read_comes_out(tmp_path: Path) -> None:
    with Sealing() as sealing:
        sealing.add(tmp_path / "gone")
        with pytest.raises(FileNotFoundError):
            sealing.digests()


def test_an_error_waits_for_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second signal, which stops at once. The file's holes alone would be read for minutes."""
    monkeypatch.setattr(files, "sync_file", lambda path: None)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 38)

    def stopped() -> None:
        with Sealing() as sealing:
            sealing.add(tmp_path / "large")
            time.sleep(0.2)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert time.monotonic() - began < 5
