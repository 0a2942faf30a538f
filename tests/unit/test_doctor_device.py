"""What NVML says, and what is wrong with a machine: each rule with a machine that has it and one that has not."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import build, drivers, no_drivers  # noqa: F401  # a fixture

from sparkctl.cli import machine_rows
from sparkctl.cli.diagnosis import verdict
from sparkctl.doctor import device, device_rules
from sparkctl.doctor.device import Device, Disk
from sparkctl.doctor.findings import Finding, Weight, by_weight
from sparkctl.doctor.launch import Claims
from sparkctl.errors import SparkError
from sparkctl.hardware import machine, nvml
from sparkctl.hardware.nvml import Gpu, Process, Reading
from sparkctl.steps import doctor as steps

GIB, GB = 1 << 30, 10**9
GB10 = Gpu("NVIDIA GB10", "12.1", 1, driver="580.95.05", cuda=(13, 0))
SPARK = Device(
    processor="Cortex-X925", cores=20, memory=120 * GIB, available=110 * GIB, swap=0, swap_used=0,
    disks=(Disk("runs here", Path("/work"), 500 * GB), Disk("temporary files", Path("/scratch/tmp"), 9 * GB, "TMPDIR")),
    gpu=GB10, problem=None, fitted=True, claims=Claims("12.1", (13, 0), 3 * GIB, 120 * GIB, True, 101_376, 65_536),
)  # fmt: skip
NO_LIBRARY = "no libnvidia-ml.so.1: NVIDIA's driver is not installed"
NO_GPU = replace(SPARK, gpu=None, claims=None, problem=NO_LIBRARY)


def gpu(**changes: object) -> Device:
    return replace(SPARK, gpu=replace(GB10, **changes))


def test_nothing_is_wrong_with_a_spark() -> None:
    assert device_rules.judge(SPARK) == []


def test_a_quick_look_forgives_a_driver_its_silence_alone() -> None:
    asleep, dead = (replace(NO_GPU, problem=f"NVML {what}") for what in ("did not end within 2 s", "died of SIGABRT"))
    assert [one.weight for one in device_rules.judge(asleep, quick=True)] == [Weight.NOTE]
    assert [one.weight for one in device_rules.judge(asleep)] == [Weight.NEEDED]
    assert [one.weight for one in device_rules.judge(dead, quick=True)] == [Weight.NEEDED]


@pytest.mark.parametrize(("what", "ok", "says"), [
    ("did not end within 2 s", True, "a GPU that did not answer a quick look"),
    ("died of SIGABRT", False, "no GPU: does not train yet, 1 thing to mend"),
])  # fmt: skip
def test_the_quick_look_at_a_sleeping_driver(monkeypatch: pytest.MonkeyPatch, what: str, ok: bool, says: str) -> None:
    """Without persistence mode a healthy driver takes 2 s a GPU."""
    monkeypatch.setattr(device, "look", lambda **_: replace(NO_GPU, problem=f"NVML {what}"))
    found = steps.doctor(quick=True)
    assert (found.ok, verdict(found).plain) == (ok, says)
    assert found.about("driver")


CASES = [
    (NO_GPU, "driver", Weight.NEEDED, "not installed (NVIDIA's driver 580 or newer is needed; a container", None),
    (replace(NO_GPU, fitted=False), "GPU", Weight.NOTE, "runs on the CPU", "sparkctl demo"),
    (replace(NO_GPU, problem="NVML: driver/library version mismatch"), "driver", Weight.NEEDED, "updated", "reboot"),
    (replace(NO_GPU, problem="NVML: insufficient permissions"), "driver", Weight.NEEDED, "its files", "/dev/nvidia*"),
    (replace(NO_GPU, problem="NVML did not end within 5 s"), "driver", Weight.NEEDED, "without `--q", "nvidia-smi"),
    (replace(NO_GPU, problem="NVML died of SIGABRT"), "driver", Weight.NEEDED, "SIGABRT", "nvrm"),
    (replace(NO_GPU, problem="too old a driver library: x"), "driver", Weight.NEEDED, "580 or newer is needed", None),
    (replace(NO_GPU, problem="CUDA_VISIBLE_DEVICES hides every GPU"), "GPU", Weight.SLOW, "hides", "unset CUDA_VIS"),
    (replace(SPARK, claims=Claims(problem="CUDA_ERROR_NOT_PERMITTED")), "CUDA", Weight.NEEDED, "_PERMI", "nvidia-smi"),
    (gpu(capability="7.5"), "GPU", Weight.NEEDED, "no bf16 in its tensor cores, which 8.0 has", None),
    (gpu(capability="13.0"), "GPU", Weight.NOTE, "13.0, unknown here: its features", "pip install -U"),
    (gpu(processes=(Process(4711, 2 * GIB), Process(2, None))), "GPU", Weight.SLOW, "another process", "-p 4711`"),
    (gpu(processes=(Process(1, GIB), Process(2, GIB))), "GPU", Weight.SLOW, "2 other processes hold", "-p 1,2`"),
    (gpu(throttled=("power brake",)), "clocks", Weight.SLOW, "power brake; a Spark's supply that is unplugged", None),
    (gpu(throttled=("software power cap",)), "clocks", Weight.NOTE, "power cap; a Spark's supply", None),
    (
        replace(gpu(throttled=("hardware slowdown",)), claims=Claims(integrated=False)), "clocks", Weight.SLOW,
        "hardware slowdown", "nvidia-smi",
    ),
    (gpu(throttled=("hardware thermal slowdown",)), "clocks", Weight.SLOW, "thermal slowdown (the machine is", None),
    (gpu(power_limit=300.0, default_limit=700.0), "power", Weight.SLOW, "capped at 300 W, of 700 W", "-pl 700"),
    (replace(SPARK, available=20 * GIB), "memory", Weight.SLOW, "20.0 of 120.0 GiB", "ps aux"),
    (replace(SPARK, swap=16 * GIB), "swap", Weight.NOTE, "hangs the whole machine", "swapoff"),
    (replace(SPARK, swap=16 * GIB, swap_used=2 * GIB), "swap", Weight.SLOW, "hangs the whole machine", "swapoff"),
    (replace(SPARK, disks=(Disk("runs here", Path("/work"), 5 * GB),)), "disk", Weight.SLOW, "5.0 GB are", None),
    (
        replace(SPARK, disks=(Disk("temporary files", Path("/scratch/tmp"), 0, "TMPDIR"),)), "disk", Weight.NEEDED,
        "0.0 GB are free for temporary files in `/scratch/tmp`", "export TMPDIR=FOLDER",
    ),
    (
        replace(SPARK, disks=(Disk("models' cache", Path("/x"), None, "HF_HUB_CACHE", "permission denied"),)), "disk",
        Weight.NEEDED, "models' cache, `/x`, cannot be used: permission denied", "export HF_HUB_CACHE=FOLDER",
    ),
    (
        replace(SPARK, disks=(Disk("runs here", Path("?"), None, None, "no such file or directory"),)), "disk",
        Weight.NEEDED, "folder for runs, `?`, cannot be used", "`cd ~`",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "subject", "weight", "what", "mend"), CASES)
def test_a_rule(seen: Device, subject: str, weight: Weight, what: str, mend: str | None) -> None:
    found = device_rules.judge(seen)
    assert [(finding.subject, finding.weight) for finding in found] == [(subject, weight)]
    assert what in found[0].what
    assert (mend in found[0].mend) if mend and found[0].mend else mend == found[0].mend


COMMAND = re.compile(r"sparkctl \w+|`[^`]+`( says why)?")


def test_every_mend_is_a_command() -> None:
    """Or there is none: advice stands in what was found."""
    mends = [finding.mend for seen, *_ in CASES for finding in device_rules.judge(seen) if finding.mend]
    assert [mend for mend in mends if not COMMAND.fullmatch(mend)] == []
    assert len(mends) > len(CASES) / 2
    assert not COMMAND.fullmatch("free some")
    assert not COMMAND.fullmatch("`sudo swapoff -a` while training")


def test_every_rule_has_a_case() -> None:
    assert all(any(list(rule(seen)) for seen, *_ in CASES) for rule in device_rules.RULES)


def test_a_gpu_that_is_full_names_who_holds_it() -> None:
    full = replace(
        gpu(processes=(Process(11, None), Process(12, None))), claims=Claims(problem="CUDA_ERROR_OUT_OF_MEMORY")
    )
    (found,) = device_rules.judge(full)
    assert (found.weight, found.mend) == (Weight.NEEDED, "`kill 11 12`")
    (found,) = device_rules.judge(replace(SPARK, claims=Claims(problem="CUDA_ERROR_OUT_OF_MEMORY")))
    assert "nvidia-smi" in found.mend


def test_heat_and_power_are_told_apart() -> None:
    both = gpu(throttled=("software power cap", "hardware slowdown", "software thermal slowdown"))
    assert [finding.what for finding in device_rules.judge(both)] == [
        "clocks are held down: software thermal slowdown (the machine is too hot: it needs air)",
        f"clocks are held down: software power cap, hardware slowdown; {device_rules.SUPPLY}",
    ]


def test_small_things_are_not_told() -> None:
    quiet = gpu(processes=(Process(1, GIB // 2), Process(2, None)), power_limit=690.0, default_limit=700.0)
    assert device_rules.judge(quiet) == []
    own = replace(SPARK, claims=replace(SPARK.claims or Claims(), integrated=False), swap=GIB, available=9 * GIB)
    assert device_rules.judge(own) == []  # its GPU has a memory of its own


@pytest.mark.parametrize(
    ("seen", "weight"),
    [
        (gpu(processes=(Process(1, GIB),)), None),
        (gpu(processes=(Process(1, GIB + 1),)), Weight.SLOW),
        (gpu(power_limit=665.0, default_limit=700.0), None),  # 95 %
        (gpu(power_limit=664.0, default_limit=700.0), Weight.SLOW),
        (gpu(capability="8.0"), None),
        (replace(SPARK, available=30 * GIB), None),  # a quarter
        (replace(SPARK, available=29 * GIB), Weight.SLOW),
        (replace(SPARK, swap=16 * GIB, swap_used=GIB), Weight.NOTE),
        (replace(SPARK, swap=16 * GIB, swap_used=GIB + 1), Weight.SLOW),
        *(
            (replace(SPARK, disks=(Disk(name, Path("/x"), free),)), weight)
            for name, least in (("runs here", 20 * GB), ("models' cache", 20 * GB), ("temporary files", GB))
            for free, weight in ((least, None), (least - 1, Weight.SLOW), (GB // 10, Weight.SLOW))
        ),
        (replace(SPARK, disks=(Disk("kernels' cache", Path("/x"), GB // 10 - 1),)), Weight.NEEDED),
        (gpu(throttled=("software power cap", "hardware slowdown")), Weight.SLOW),
    ],
)
def test_the_bounds(seen: Device, weight: Weight | None) -> None:
    assert [finding.weight for finding in device_rules.judge(seen)] == ([weight] if weight is not None else [])


def test_the_heaviest_come_first_and_each_once() -> None:
    light, heavy = (Finding("a", weight, "what", "mend") for weight in (Weight.NOTE, Weight.NEEDED))
    middle = Finding("b", Weight.SLOW, "what", "mend")
    assert by_weight([light, middle, heavy, middle]) == [heavy, middle, light]


@pytest.fixture
def management(drivers: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:  # noqa: F811
    """NVML is the one of tests/drivers."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(drivers))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_a_gb10_has_no_memory_of_its_own(management: pytest.MonkeyPatch) -> None:
    assert nvml.read() == Reading(
        Gpu(
            "NVIDIA GB10", "12.1", 1, driver="580.95.05", cuda=(13, 0), clock=2418, most_clock=3003, memory_clock=8533,
            power=12.5, temperature=48, busy=0,
        )
    )  # fmt: skip


def test_a_gpu_with_all_of_it(management: pytest.MonkeyPatch) -> None:
    settings = dict(
        FAKE_GPU="NVIDIA H200", FAKE_MAJOR=9, FAKE_MINOR=0, FAKE_MEMORY=150 * GB, FAKE_USED=GB, FAKE_LIMIT=350_000,
        FAKE_THROTTLE=0x4 | 0x40 | 0x1, FAKE_HELD=3 * GIB, FAKE_BUSY=97,
    )  # fmt: skip
    for name, value in settings.items():
        management.setenv(name, str(value))
    found = nvml.read().gpu
    assert found
    assert (found.name, found.capability, found.memory, found.used) == ("NVIDIA H200", "9.0", 150 * GB, GB)
    assert (found.power_limit, found.default_limit) == (350.0, 700.0)
    assert found.throttled == ("software power cap", "hardware thermal slowdown")
    assert found.processes == (Process(4711, 3 * GIB),)
    assert found.busy == 97


@pytest.mark.parametrize(
    ("status", "problem"),
    [(4, "insufficient permissions"), (9, "driver not loaded"), (18, "driver/library version mismatch")],
)
def test_a_driver_that_refuses(management: pytest.MonkeyPatch, status: int, problem: str) -> None:
    management.setenv("FAKE_NVML", str(status))
    assert nvml.read() == Reading(problem=f"NVML: {problem}")


def test_gpus_that_are_not_visible(management: pytest.MonkeyPatch) -> None:
    management.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvml.read() == Reading(problem="CUDA_VISIBLE_DEVICES hides every GPU")
    management.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert nvml.read().problem == "NVML: unknown error"


@pytest.mark.parametrize(("status", "problem"), [(-1, "NVML did not end within 1 s"), (-2, "NVML died of SIGABRT")])
def test_a_driver_that_hangs_or_aborts_is_an_answer(management: pytest.MonkeyPatch, status: int, problem: str) -> None:
    management.setenv("FAKE_NVML", str(status))
    management.setattr(nvml, "SECONDS", 1.0)
    assert nvml.read(1.0) == Reading(problem=problem, answered=False)
    assert device.look().problem == problem
    management.setattr(nvml.read, "__defaults__", (1.0,))
    with pytest.raises(SparkError, match=problem) as error:
        machine.find_gpu()
    assert error.value.hint == "sparkctl doctor"


def test_a_library_that_lacks_a_function_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build(tmp_path, "-DBARE")))
    said = "too old a driver library: libnvidia-ml.so.1: undefined symbol: nvmlDeviceGetHandleByIndex_v2"
    assert nvml.read().problem in (said, said.replace("DeviceGetHandleByIndex_v2", "Shutdown"))


@pytest.mark.parametrize(
    ("problem", "stops"),
    [
        ("NVML: driver/library version mismatch", True),
        ("NVML: driver not loaded", True),
        ("NVML: insufficient permissions", True),
        ("too old a driver library: x", True),
        ("libnvidia-ml.so.1 cannot be loaded: file too short", True),
        (NO_LIBRARY, False),
        ("CUDA_VISIBLE_DEVICES hides every GPU", False),
    ],
)
def test_no_plan_for_the_cpu_where_a_gpu_is_fitted_and_does_not_answer(
    problem: str, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "read", lambda: Reading(problem=problem))
    assert machine.find_gpu(tmp_path) is None  # nor is one fitted
    loaded = tmp_path / "proc/driver/nvidia/version"
    loaded.parent.mkdir(parents=True)
    loaded.touch()
    if stops:
        with pytest.raises(SparkError, match=f"the GPU cannot be asked: {problem}") as error:
            machine.find_gpu(tmp_path)
        assert error.value.hint == "sparkctl doctor"
    else:
        assert machine.find_gpu(tmp_path) is None


def test_what_is_meant_is_what_the_library_s_reader_says(management: pytest.MonkeyPatch) -> None:
    management.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvml.read().meant
    management.delenv("CUDA_VISIBLE_DEVICES")
    assert not nvml.read().meant
    management.setenv("FAKE_NVML", "9")
    assert not nvml.read().meant
    management.setattr(nvml, "LIBRARY", "libnvidia-ml.so.not-here")
    assert nvml.here().meant


def test_no_management_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libnvidia-ml.so.not-here")
    assert nvml.here().problem == NO_LIBRARY.replace("so.1", "so.not-here")


def test_a_file_that_is_no_library_is_told_in_the_loader_s_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(no_drivers(tmp_path)))
    place = tmp_path / "libnvidia-ml.so.1"
    assert nvml.read().problem == f"libnvidia-ml.so.1 cannot be loaded: {place}: file too short"


def test_folders_that_are_gone_are_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder was removed, and no temporary file can be made anywhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work").rmdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [])
    monkeypatch.setattr(nvml, "read", lambda seconds: Reading(problem=NO_LIBRARY))
    seen = device.look(root=tmp_path)
    closed = {disk.name: disk.problem for disk in seen.disks if disk.free is None}
    assert closed["runs here"] == "no such file or directory"
    assert closed["temporary files"]
    assert set(closed) == {"runs here", "temporary files"}
    shown = dict(machine_rows.rows(seen))
    assert shown["disk, runs here"] == "? cannot be used: no such file or directory"


def test_the_machine_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "read", lambda seconds: Reading(problem=NO_LIBRARY))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 1000 kB\nMemAvailable: 700 kB\nSwapTotal: 300 kB\nSwapFree: 200 kB\n"
    )
    seen = device.look(root=tmp_path)
    assert (seen.memory, seen.available, seen.swap, seen.swap_used) == (1_024_000, 716_800, 307_200, 102_400)
    assert (seen.gpu, seen.claims, seen.fitted, seen.unified) == (None, None, False, False)
    assert [disk.name for disk in seen.disks] == list(device_rules.LEAST)
    card = tmp_path / "sys/bus/pci/devices/000f:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x020000\n")  # a network card of theirs
    assert not device.look(root=tmp_path).fitted
    (card / "class").write_text("0x030000\n")
    assert device.look(root=tmp_path).fitted
