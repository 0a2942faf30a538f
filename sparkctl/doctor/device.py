"""The machine: its GPU as NVML and CUDA tell it, memory, swap, disks."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparkctl import env
from sparkctl.doctor import launch
from sparkctl.doctor.launch import Claims
from sparkctl.errors import reason
from sparkctl.hardware import nvml
from sparkctl.hardware.machine import available_cores, available_memory, disk_free, fitted, processor_name
from sparkctl.hardware.nvml import Gpu

SECONDS = launch.SECONDS
UNKNOWN = Path("?")  # a folder that is not even found
LEAST = 0.3  # seconds for CUDA, however long NVML took


@dataclass(frozen=True)
class Disk:
    """A folder that training writes to and the bytes free there. cache: it can be put elsewhere by `variable`.

    free: None where it cannot be used at all, for `problem`.
    """

    name: str
    folder: Path
    free: int | None
    variable: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Device:
    """The machine. Bytes. gpu: None where NVML sees none, for `problem`; fitted: a GPU is on the bus nevertheless."""

    processor: str
    cores: int
    memory: int | None
    available: int
    swap: int | None
    swap_used: int | None
    disks: tuple[Disk, ...]
    gpu: Gpu | None
    problem: str | None
    fitted: bool
    claims: Claims | None
    toolkit: str | None = None

    @property
    def usable(self) -> bool:
        """Whether something can be computed on: the GPU where there is one, if CUDA starts on it."""
        return not (self.claims and self.claims.problem)

    @property
    def unified(self) -> bool:
        """Whether the GPU shares the host's memory."""
        integrated = self.claims.integrated if self.claims else None
        return self.gpu is not None and (integrated if integrated is not None else self.gpu.memory is None)


def look(*, seconds: float = SECONDS, toolkit: str | None = None, root: Path = Path("/")) -> Device:
    """All of it. seconds: that NVML and CUDA's driver may take together. toolkit: its release, from its ptxas."""
    began = time.monotonic()
    reading = nvml.read(min(seconds, nvml.SECONDS))
    gpu = reading.gpu
    meminfo = _meminfo(root)
    swap, swap_free = meminfo.get("SwapTotal"), meminfo.get("SwapFree")
    return Device(
        processor=processor_name(root), cores=available_cores(root), memory=meminfo.get("MemTotal"),
        available=available_memory(root), swap=swap,
        swap_used=swap - swap_free if swap is not None and swap_free is not None else None, disks=_disks(), gpu=gpu,
        problem=reading.problem, fitted=fitted(root), toolkit=toolkit,
        claims=launch.claims(max(round(seconds + began - time.monotonic(), 1), LEAST)) if gpu else None,
    )  # fmt: skip


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return {}
    return {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _disks() -> tuple[Disk, ...]:
    places: tuple[tuple[str, Callable[[], Path], str | None], ...] = (
        ("runs here", Path.cwd, None),
        ("models' cache", env.hub_cache, "HF_HUB_CACHE"),
        ("kernels' cache", env.triton_cache, "TRITON_CACHE_DIR"),
        ("temporary files", lambda: Path(tempfile.gettempdir()), "TMPDIR"),
    )
    return tuple(_disk(name, place, variable) for name, place, variable in places)


def _disk(name: str, place: Callable[[], Path], variable: str | None) -> Disk:
    """One of them: a folder that is gone or closed is an answer."""
    folder = UNKNOWN
    try:
        folder = place()
        return Disk(name, folder, disk_free(folder.absolute()), variable)
    except OSError as error:
        return Disk(name, folder, None, variable, reason(error))
