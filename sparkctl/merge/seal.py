"""`sparkctl.json` in a folder that a merge wrote: what the folder was made from, and the size and digest of each file.

It is written last, so that a folder is looked through quickly later: a file that is no newer than the seal and has
its size is taken as unchanged, any other is hashed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from sparkctl.files import sha256_bytes, sha256_file
from sparkctl.manifest.table import Table

SEAL = "sparkctl.json"


class SealedFile(Table):
    size: int
    sha256: str


class Seal(Table):
    """The content of sparkctl.json."""

    format: int = 1
    made_from: str
    run: str = Field(description="id of the run")
    checkpoint: str = Field(description="the training checkpoint that was merged")
    tensors: int
    changed_tensors: int
    bytes: int
    seconds: float
    created: str
    files: dict[str, SealedFile]

    @property
    def digest(self) -> str:
        """One digest over all the files."""
        return sha256_bytes("".join(f"{name} {file.sha256}\n" for name, file in sorted(self.files.items())).encode())


S = TypeVar("S", bound=Seal)


def sealed_files(folder: Path, known: Mapping[str, SealedFile] | None = None) -> dict[str, SealedFile]:
    """Size and digest of every file in `folder`, the seal left out; those `known` are not read again."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    known = known or {}
    return {
        name: known.get(name) or SealedFile(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in names
    }


def write_seal(folder: Path, seal: Seal) -> None:
    """The last of the folder's files."""
    (folder / SEAL).write_text(seal.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_seal(folder: Path, kind: type[S] = Seal) -> S | None:  # type: ignore[assignment]
    """The folder's seal; None where there is none, or none of that kind that can be read."""
    try:
        return kind.model_validate_json((folder / SEAL).read_bytes())
    except (OSError, ValidationError):
        return None


def sealed_as(folder: Path, made_from: str, kind: type[S] = Seal) -> S | None:  # type: ignore[assignment]
    """The folder's seal where it was made from that and is what was written, else None."""
    seal = read_seal(folder, kind)
    return seal if seal and seal.made_from == made_from and intact(folder, seal) else None


def intact(folder: Path, seal: Seal) -> bool:
    """Whether every sealed file is there and is what was written."""
    written = (folder / SEAL).stat().st_mtime_ns
    for name, file in seal.files.items():
        path = folder / name
        if not path.is_file():
            return False
        status = path.stat()
        if status.st_size != file.size or (status.st_mtime_ns > written and sha256_file(path) != file.sha256):
            return False
    return True


def untouched(folder: Path, seal: Seal) -> bool:
    """Whether it is intact and holds nothing else: no file or folder that somebody put there since."""
    names = {Path(SEAL), *map(Path, seal.files)}
    known = names.union(*(name.parents for name in names))
    return intact(folder, seal) and all(path.relative_to(folder) in known for path in folder.rglob("*"))
