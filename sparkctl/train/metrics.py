"""metrics.jsonl: a line an optimiser step, and an eval line where one was due. A line is there whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.files import naming, sync_folder, write_atomic

if TYPE_CHECKING:
    import torch

TIMING = ("tokens_per_second", "seconds", "memory")  # what differs between two runs that are equal otherwise


class Metrics:
    """Appends to the file. A line that the disk has no room for is taken back before the error goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sync_folder(path.parent)

    def write(self, **values: Any) -> None:
        """Append one line, in one write."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(28, os.strerror(28))
        except OSError as error:
            os.ftruncate(self._file, end)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def sync(self) -> None:
        """Wait until the disk has every line: a checkpoint must not outlive the lines that lead to it."""
        with naming(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last one that a kill tore is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if _whole(line)]


def truncate(path: Path, step: int) -> None:
    """Keep what was written up to the end of optimiser step `step`, atomically; step 0 means an empty file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if step and _whole(line) and json.loads(line)["step"] <= step]
    if len(kept) != len(lines):
        write_atomic(path, b"".join(kept))


def _whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line).get("step"), int)
    except (ValueError, AttributeError):
        return False


def peak_memory(device: torch.device) -> int:
    """The most bytes that training held so far: on the GPU, or of this process where the CPU trains."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
