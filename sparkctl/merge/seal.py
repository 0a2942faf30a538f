"""`sparkctl.json` in a folder that a merge wrote: what the folder was made from, and the size and digest of each file.

It is written last, so that a folder is looked through quickly later: a file that is no newer than the seal and has
its size is taken as unchanged, any other is hashed.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from sparkctl.files import sha256_bytes, sha256_file
from sparkctl.manifest.schema import Table

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


def sealed_files(folder: Path) -> dict[str, SealedFile]:
    """Size and digest of every file in `folder`, the seal left out."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {name: SealedFile(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name)) for name in names}


def read_seal(folder: Path) -> Seal | None:
    """The folder's seal; None where there is none, or none that can be read."""
    try:
        return Seal.model_validate_json((folder / SEAL).read_bytes())
    except (OSError, ValidationError):
        return None


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
