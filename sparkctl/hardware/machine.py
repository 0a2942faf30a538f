"""The machine at hand, read from NVML and /proc: no torch, a tenth of a second.

Memory is what a training may take. On a GPU with its own memory that is the GPU's. Where GPU and CPU share one
(GB10) or the CPU trains, it is what the kernel could give now, MemAvailable: CUDA's own "free" is MemFree there, far
too small after files were read. A container's limit counts too.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from sparkctl.errors import SparkError
from sparkctl.hardware import nvml
from sparkctl.hardware.nvml import Gpu
from sparkctl.manifest.schema import Machine

HOST_RESERVE = 6 << 30  # bytes left to a host whose GPU shares its memory: it hangs where they run out
CPU_RESERVE = 0.03  # share of a CPU's memory that stays free
NVIDIA, DISPLAYS = "0x10de", "0x03"  # of PCI: a vendor, the first digits of a class


def this_machine() -> Machine:
    """What `recommend` plans for: the first visible GPU where the installed torch can use it, else the CPU."""
    gpu = find_gpu() if torch_has_cuda() else None
    cores = available_cores()
    if gpu is None:
        memory = int(available_memory() * (1 - CPU_RESERVE))
        return Machine(name=processor_name(), device="cpu", capability=None, memory=memory, cores=cores)
    return Machine(
        name=gpu.name,
        device="cuda",
        capability=gpu.capability,
        memory=available_memory() - HOST_RESERVE if gpu.memory is None else gpu.memory,
        unified_memory=gpu.memory is None,
        cores=cores,
    )


def identity(machine: Machine) -> list[str | int | None]:
    """What makes it the same machine tomorrow, when other memory is free."""
    return [machine.name, machine.device, machine.capability, machine.cores]


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version.py without importing it."""
    spec = find_spec("torch")
    version = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    if version is None or not version.exists():
        return False
    values = [line.partition("=")[2].strip() for line in version.read_text().splitlines() if line.startswith("cuda")]
    return any(value not in ("", "None") for value in values)


def has_fla() -> bool:
    """Whether flash-linear-attention is installed: transformers then runs GatedDeltaNet on it."""
    return find_spec("fla") is not None


def find_gpu(root: Path = Path("/")) -> Gpu | None:
    """The first visible GPU by NVML, the driver's own library; None where there is no driver or no GPU, or all are
    hidden.

    Its `memory` is None where it has none of its own. Raises SparkError where the driver hangs or aborts, or refuses to
    tell of a GPU that is fitted: a plan for the CPU would be none for this machine.
    """
    reading = nvml.read()
    if reading.problem and (not reading.answered or (fitted(root) and not reading.meant)):
        raise SparkError(f"the GPU cannot be asked: {reading.problem}", "sparkctl doctor")
    return reading.gpu


def fitted(root: Path = Path("/")) -> bool:
    """Whether a GPU of NVIDIA's is on the PCI bus, driver or not."""
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (folder / "vendor").read_text(), (folder / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == NVIDIA and kind.startswith(DISPLAYS):
            return True
    return (root / "proc/driver/nvidia/version").exists()


def processor_name(root: Path = Path("/")) -> str:
    """The processor's name; Arm kernels give none, so the architecture stands for it."""
    for line in _lines(root / "proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def available_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on: its affinity, and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        quota, period = _words(folder / "cpu.max", 2) or ["max", "1"]
        if quota == "max":
            quota = (_words(folder / "cpu.cfs_quota_us", 1) or ["-1"])[0]
            period = (_words(folder / "cpu.cfs_period_us", 1) or ["100000"])[0]
        if int(quota) > 0:
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that may still be taken without swapping: MemAvailable, or less in a container with a limit."""
    available = [int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if "MemAvailable" in line]
    room = available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _groups(root, "memory"):
        limit = _words(folder / "memory.max", 1) or _words(folder / "memory.limit_in_bytes", 1)
        used = _words(folder / "memory.current", 1) or _words(folder / "memory.usage_in_bytes", 1)
        if limit and used and limit[0].isdigit():
            room = min(room, max(0, int(limit[0]) - int(used[0]) + _reclaimable(folder)))
    return room


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group and all above it, version 2 or 1: each may set a limit.

    Inside a container the path may name a group of the host that cannot be seen; those above it can.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.strip().split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        here = base / path.lstrip("/")
        yield from (folder for folder in (here, *here.parents) if folder.is_dir() and folder.is_relative_to(base))


def _reclaimable(folder: Path) -> int:
    """File pages that the kernel drops when memory is wanted, read lately or not: MemAvailable counts both too.

    Version 1 counts the groups below, as its usage does, in lines of their own.
    """
    pages = dict(line.split() for line in _lines(folder / "memory.stat") if "active_file " in line)
    with_below = "total_" if "total_inactive_file" in pages else ""
    return sum(int(pages.get(f"{with_below}{kind}_file", 0)) for kind in ("active", "inactive"))


def _words(path: Path, count: int) -> list[str] | None:
    lines = _lines(path)
    words = lines[0].split() if lines else []
    return words if len(words) >= count else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
