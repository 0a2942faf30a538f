"""Machine facts from files laid out as a kernel lays them out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sparkctl.hardware import machine
from sparkctl.hardware.nvml import Gpu

MIB = 1 << 20
MEMINFO = "MemTotal: 131072000 kB\nMemFree: 1024 kB\nMemAvailable: 65536000 kB\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with /proc and no limits."""
    for path in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    return tmp_path


def group(root: Path, path: str, **files: str) -> None:
    """A control group with these files."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_is_what_is_available_not_what_is_free(root: Path) -> None:
    assert machine.available_memory(root) == 65536000 * 1024


def test_a_limit_counts_with_what_is_used_and_what_can_be_dropped(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/box/job\n")
    group(
        root,
        "box",
        memory__max=str(4096 * MIB),
        memory__current=str(3000 * MIB),
        memory__stat=f"anon 5\ninactive_file {400 * MIB}\nactive_file {100 * MIB}\n",
    )
    group(root, "box/job", memory__max="max", memory__current="1", cpu__max="max 100000")
    assert machine.available_memory(root) == (4096 - 3000 + 500) * MIB


def test_a_limit_of_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("4:memory:/job\n3:cpuset:/\n0::/\n")
    group(root, "memory/job", memory__limit_in_bytes=str(1000 * MIB), memory__usage_in_bytes=str(900 * MIB))
    assert machine.available_memory(root) == 100 * MIB
    group(root, "memory/job", memory__stat=f"inactive_file 1\ntotal_inactive_file {50 * MIB}\ntotal_active_file 0\n")
    assert machine.available_memory(root) == 150 * MIB  # of the groups below too, as the usage is


def test_a_group_that_cannot_be_seen_from_inside(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/host/path/that/is/not/here\n")
    group(root, "", memory__max=str(1000 * MIB), memory__current=str(400 * MIB))
    assert machine.available_memory(root) == 600 * MIB


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_cores_by_quota(root: Path, quota: str, cores: int | None) -> None:
    (root / "proc/self/cgroup").write_text("0::/job\n")
    group(root, "job", cpu__max=quota)
    assert machine.available_cores(root) == (cores or len(os.sched_getaffinity(0)))


def test_processor_name(root: Path) -> None:
    (root / "proc/cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine.processor_name(root) == "Some CPU @ 2 GHz"
    (root / "proc/cpuinfo").write_text("processor: 0\n")
    assert machine.processor_name(root) == os.uname().machine


def test_disk_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert machine.disk_free(tmp_path / "not" / "there") == pytest.approx(machine.disk_free(tmp_path), rel=0.05)


def test_unified_memory_leaves_room_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(machine, "available_memory", lambda: 120 << 30)
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("NVIDIA GB10", "12.1", 1))
    spark = machine.this_machine()
    assert (spark.device, spark.unified_memory, spark.memory) == ("cuda", True, (120 << 30) - machine.HOST_RESERVE)
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0", 1, memory=140 << 30))
    assert machine.this_machine().memory == 140 << 30


def test_a_gpu_that_torch_cannot_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: False)
    monkeypatch.setattr(machine, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0", 1, memory=140 << 30))
    assert machine.this_machine().device == "cpu"


def test_cuda_of_torch_without_importing_it() -> None:
    before = "torch" in sys.modules
    found = machine.torch_has_cuda()
    assert ("torch" in sys.modules) == before
    import torch

    assert found == (torch.version.cuda is not None)
