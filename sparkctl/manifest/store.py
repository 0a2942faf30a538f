"""A run on disk: the manifest is read and checked whole, written whole, and locked.

Two locks, both released by the kernel when their process dies: `.manifest.lock` for the instant of a write, and
`.step.lock` for as long as a step works, which is how a running step is told from a killed one.
"""

from __future__ import annotations

import fcntl
import json
import os
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout
from pydantic import ValidationError

from sparkctl import __version__
from sparkctl.errors import SparkError, UsageError
from sparkctl.files import make_folder, write_atomic
from sparkctl.manifest.schema import SCHEMA, Manifest, RunTable
from sparkctl.manifest.table import run_paths
from sparkctl.words import quoted

NAME = "run.toml"
STEP_LOCK = ".step.lock"


def now() -> str:
    """This instant as the manifest writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Run:
    """A run's folder and its manifest as last read. Steps change it only through `edit`.

    `root` is the folder as the user named it, for messages and the commands in their hints.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.read_only = False  # a step found that nothing can be written here

    @classmethod
    def create(cls, root: Path, *, parent: Run | None = None, continues: bool = False) -> Run:
        """A new run in `root` (made where absent). Raises UsageError where a run is there already.

        Raises OSError where it cannot be written; a folder that was made for it goes away again.
        """
        root = Path(root)
        if root.exists() and not root.is_dir():
            raise UsageError(f"`{root}` is a file; a run is a folder", "name a folder with `--run`")
        made = not root.exists()
        make_folder(root)
        link = os.path.relpath(parent.root, root) if parent else None
        table = RunTable(
            id=uuid.uuid4().hex[:12],
            name=root.absolute().name,
            created=now(),
            sparkctl=__version__,
            folder=str(root.absolute()),
            parent=link,
            continues=continues,
        )
        run = cls(root, Manifest(schema_=SCHEMA, run=table))
        try:
            run._write_first()
        except BaseException:
            if made:
                with suppress(OSError):  # another's run may be in it by now
                    root.rmdir()
            raise
        return run

    @classmethod
    def open(cls, root: Path) -> Run:
        """The run in `root`. Raises UsageError where it is absent, broken or from a newer sparkctl."""
        root = Path(root)
        return cls(root, read_manifest(root))

    def read(self) -> None:
        """Take the manifest as it is on disk now."""
        self.manifest = read_manifest(self.root)

    @contextmanager
    def edit(self) -> Iterator[Manifest]:
        """The manifest as it is on disk now, under the lock; what the block changes is written whole at its end."""
        self.require_writable()
        with self._manifest_lock():
            manifest = read_manifest(self.root)
            yield manifest
            manifest.run.sparkctl = __version__
            manifest.run.folder = str(self.root.absolute())
            self._write(manifest)
            self.manifest = manifest

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Hold the run for one step. Raises SparkError where another process works in it.

        On a read-only file system there is no lock to hold: a step may still find that its work is done. One that has
        something to write calls `require_writable` before it begins.
        """
        try:
            lock = self._take_step_lock()
        except Timeout:
            raise SparkError(
                f"{self._holder()} in `{self.root}`", "wait for it, or stop it with Ctrl-C: it saves before it ends"
            ) from None
        self.read_only = lock is None
        try:
            with suppress(OSError):  # it only names the holder; a full disk is reported by the work itself
                (self.root / ".step.json").write_text(json.dumps({"step": name, "pid": os.getpid()}))
            self.read()
            yield
        finally:
            if lock:
                lock.release()

    def require_writable(self) -> None:
        """Raise SparkError where the step at work here has found that nothing can be written."""
        if self.read_only:
            raise SparkError(
                f"nothing can be written to `{self.root}`: it is read-only",
                f"work on a copy: `cp -r {quoted(self.root)} FOLDER`",
            )

    def made(self, id: str | None) -> str | None:
        """When the checkpoint of that id was written; None where there is none."""
        entry = self.manifest.checkpoint(id) if id else None
        return entry.created if entry else None

    def running(self) -> str | None:
        """Which step works in this run right now ("train", …), or None."""
        try:
            lock = self._take_step_lock()
        except Timeout:
            return str(self._claim().get("step", "a step"))
        if lock:
            lock.release()
        return None

    def resolve(self, path: str) -> Path:
        """A manifest's path as one that can be opened: relative to the run. One that leads out of it is counted from
        where the run was before a move, if it leads nowhere from here.
        """
        return _find(path, self.root.absolute(), Path(self.manifest.run.folder))

    def relative(self, path: Path) -> str:
        """A path as the manifest keeps it: relative to the run's folder."""
        return os.path.relpath(Path(path).absolute(), self.root)

    def _write_first(self) -> None:
        with self._manifest_lock():
            if (self.root / NAME).exists():  # looked at under the lock: of two that make the run, one does
                raise UsageError(f"`{self.root}` holds a run already", f"sparkctl show {quoted(self.root)}")
            try:
                self._write(self.manifest)
            except BaseException:
                (self.root / ".manifest.lock").unlink(missing_ok=True)
                raise

    def _write(self, manifest: Manifest) -> None:
        values = manifest.model_dump(mode="json", by_alias=True, exclude_none=True)
        Manifest.model_validate(values)
        write_atomic(self.root / NAME, tomli_w.dumps(values).encode())

    @contextmanager
    def _manifest_lock(self) -> Iterator[None]:
        with FileLock(self.root / ".manifest.lock", timeout=60):
            yield

    def _take_step_lock(self) -> FileLock | None:
        """The lock, taken; None where nothing can be written. Raises Timeout where another process has it."""
        path = self.root / STEP_LOCK
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise
        except OSError:
            if os.access(self.root, os.W_OK):
                raise
            if _is_locked(path):  # the same folder may be writable for others: a read-only mount of it
                raise Timeout(str(path)) from None
            return None
        return lock

    def _claim(self) -> dict[str, Any]:
        try:
            claim = json.loads((self.root / ".step.json").read_text())
        except (OSError, ValueError):
            return {}
        return claim if isinstance(claim, dict) else {}

    def _holder(self) -> str:
        claim = self._claim()
        return f"`{claim.get('step', 'a step')}` is running (process {claim.get('pid', 'unknown')})"


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine holds the lock in `path`; asked without writing."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or not for us to read
        return False
    return False


def read_manifest(root: Path) -> Manifest:
    """`run.toml` in `root`, migrated and checked, its paths counted from `root`. Every problem is named at once."""
    path = root / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"`{root}` is not a run: it has no {NAME}", f"sparkctl analyze DATA --run {quoted(root)} --model MODEL"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"`{path}` is not UTF-8: {error.reason} at byte {error.start}", "mend it by hand or restore the file"
        ) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"`{path}` is broken: {error}", "mend the line by hand or restore the file") from None
    try:
        manifest = Manifest.model_validate(migrate(values, path))
    except ValidationError as error:
        raise UsageError(f"`{path}` does not hold:\n{describe(error)}", "mend the keys named above") from None
    _follow_move(manifest, root.absolute())
    return manifest


def _find(path: str, root: Path, before: Path) -> Path:
    """Where a path of a run in `root` leads; from `before`, where the run was, if it leads out of the run and nowhere
    from here. What lies within came along, or is gone: the run that was copied may be another one by now.
    """
    here, there = (Path(os.path.normpath(folder / path)) for folder in (root, before))
    return there if _leads_out(path) and there.exists() and not here.exists() else here


def _leads_out(path: str) -> bool:
    return Path(path).parts[:1] == ("..",)


def _follow_move(manifest: Manifest, root: Path) -> None:
    """Count the paths that lead out of a moved run from where it is now; what lies within it came along."""
    before = Path(manifest.run.folder)
    if before == root:
        return

    for table, key, path in run_paths(manifest):
        if _leads_out(path):
            setattr(table, key, os.path.relpath(_find(path, root, before), root))


def describe(error: ValidationError) -> str:
    """A pydantic error as one line a problem: the key, then what is wrong."""
    problems = [(".".join(map(str, e["loc"])), e["msg"].lower().removeprefix("value error, ")) for e in error.errors()]
    return "\n".join(f"  {key or '(top)'}: {what}" for key, what in problems)


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def migrate(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Values of an older schema brought to this one, a version at a time. Raises UsageError on a newer one."""
    version = values.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UsageError(
            f"`{path}` has no valid `schema` number", f"a manifest of this version says `schema = {SCHEMA}`"
        )
    if version > SCHEMA:
        raise UsageError(
            f"`{path}` has schema {version}; this sparkctl {__version__} knows {SCHEMA}",
            "pip install --upgrade dgx-sparkctl",
        )
    for step in range(version, SCHEMA):
        values = MIGRATIONS[step](values) | {"schema": step + 1}
    return values
