"""Files that are complete or absent: atomic writes, staged folders, digests."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

CHUNK = 1 << 20  # bytes read at a time: large enough for full disk speed, small beside any memory


def sha256_bytes(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, given_up: Event | None = None) -> str:
    """Hex digest of a file, read in chunks; of no use once it is `given_up`, which ends it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not (given_up and given_up.is_set()) and (chunk := file.read(CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Sealing:
    """Finds the digests of files and gives them to the disk, in threads of its own, while the next ones are written.

    An error in its block gives that up. What reading or the disk raised comes out of `digests`.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(thread_name_prefix="sealing")
        self._given_up = Event()
        self._digests: dict[str, Future[str]] = {}
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Sealing:
        return self

    def add(self, path: Path) -> None:
        """A file that is written to its end."""
        self._digests[path.name] = self._threads.submit(sha256_file, path, self._given_up)
        self._synced.append(self._threads.submit(sync_file, path))

    def digests(self) -> dict[str, str]:
        """Of each file by its name, once the disk has them all."""
        for one in self._synced:
            one.result()
        return {name: one.result() for name, one in self._digests.items()}

    def __exit__(self, *error: object) -> None:
        self._given_up.set()
        self._threads.shutdown(cancel_futures=True)


def sync_folder(folder: Path) -> None:
    """Make a rename or a creation in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make it and the folders above it, where absent. Raises NotADirectoryError where one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # of the last one alone; of those above it the system says it itself
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a write to an open file says nothing but "no space left": let it name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename, error.strerror = str(path), os.strerror(error.errno)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under `path` whole or not at all. Raises OSError naming the place."""
    with staged_file(path) as stage:
        stage.write_bytes(data)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A temporary file beside `final`, synced and renamed to it where the block ends well. Raises OSError naming it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    os.close(handle)
    try:
        with naming(final):
            yield Path(temporary)
            sync_file(Path(temporary))
        Path(temporary).chmod(0o644)
        os.replace(temporary, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(final.parent)


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` that gets the final name only where the block ends well.

    Every file in it is synced before the rename. Where `final` exists, `replace` swaps it out at the very end;
    without it FileExistsError is raised before any work. Leftovers of killed processes are swept by `sweep_stages`.
    """
    if final.exists() and not replace:
        raise FileExistsError(17, "already exists", str(final))
    make_folder(final.parent)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    stage.chmod(0o755)
    try:
        yield stage
        for path in sorted(stage.rglob("*")):
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(stage)
        if final.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old.tmp", dir=final.parent))
            try:
                os.replace(final, old / final.name)
                os.replace(stage, final)
            except BaseException:
                if not final.exists():
                    os.replace(old / final.name, final)
                raise
            finally:
                if final.exists():
                    shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(stage, final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    sync_folder(final.parent)


def sweep_stages(folder: Path, name: str = "") -> None:
    """Remove what killed writers left in `folder`, of `name` alone where given. Only while holding the step lock.

    A folder that was taken away for one that never came goes back to its place.
    """
    stages = rf"\.{re.escape(name)}\.[^.]+(\.old)?\.tmp" if name else ".*"  # `.merged.v2.….tmp` is not of `merged`
    for path in folder.glob(".*.tmp"):
        if not re.fullmatch(stages, path.name):
            continue
        if path.is_dir():
            _put_back(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _put_back(old: Path) -> None:
    """See `staged_folder`: `.NAME.….old.tmp/NAME` was `NAME` until a kill came between its two renames."""
    for kept in old.iterdir() if old.name.endswith(".old.tmp") else ():
        if old.name.startswith(f".{kept.name}.") and not (old.parent / kept.name).exists():
            os.replace(kept, old.parent / kept.name)
