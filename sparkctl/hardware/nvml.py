"""What NVIDIA's management library says of a GPU, by ctypes: no torch, no CUDA context.

`read` asks it in a process of its own, `python -m sparkctl.hardware.nvml`: a driver may hang or abort.
Every field may be None: a GB10 answers "not supported" to the questions about a memory and a power limit of its own.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p, create_string_buffer
from dataclasses import asdict, dataclass
from typing import Any

from sparkctl import child, env

LIBRARY = "libnvidia-ml.so.1"
SECONDS = 30.0  # a driver that was asleep takes two for each of its GPUs
HIDDEN = "CUDA_VISIBLE_DEVICES hides every GPU"
NO_DRIVER = "NVIDIA's driver is not installed"
NOT_THERE = "cannot open shared object file: No such file"  # how the loader says it of the library itself
SM, MEMORY = 1, 2  # clocks
TOO_SMALL = 7  # there are more processes than room was given for
MOST_PROCESSES = 64
UNKNOWN = (1 << 64) - 1  # bytes of a process that the driver does not count
# bits of the reasons why clocks are below their highest; the others are choices, or an idle GPU
REASONS = {
    0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """A process on the GPU and the bytes it holds, None where the driver does not say."""

    pid: int
    bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU. Bytes, MHz, watts, °C. memory is None where it shares the host's. busy: per cent of the
    last moments, a second or less, in which something computed on it.
    """

    name: str
    capability: str
    count: int
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    memory: int | None = None
    used: int | None = None
    clock: int | None = None
    most_clock: int | None = None
    memory_clock: int | None = None
    power: float | None = None
    power_limit: float | None = None
    default_limit: float | None = None
    temperature: int | None = None
    busy: int | None = None
    throttled: tuple[str, ...] = ()
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The GPU, or the problem: why none is seen. answered: the library said so itself."""

    gpu: Gpu | None = None
    problem: str | None = None
    answered: bool = True

    @property
    def meant(self) -> bool:
        """Whether it is somebody's choice that none is seen: no driver is installed, or the environment hides all."""
        return self.problem is not None and (self.problem == HIDDEN or self.problem.endswith(NO_DRIVER))

    @classmethod
    def of(cls, said: dict[str, Any]) -> Reading:
        """From its JSON."""
        gpu = said["gpu"]
        if gpu is None:
            return cls(problem=said["problem"])
        cuda, processes = gpu.pop("cuda"), tuple(Process(**one) for one in gpu.pop("processes"))
        throttled = tuple(gpu.pop("throttled"))
        return cls(Gpu(**gpu, cuda=tuple(cuda) if cuda else None, throttled=throttled, processes=processes))


class _Memory(ctypes.Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", c_uint), ("memory", c_uint))


class _Process(ctypes.Structure):
    _fields_ = (("pid", c_uint), ("bytes", c_ulonglong), ("instance", c_uint), ("compute", c_uint))


def read(seconds: float = SECONDS) -> Reading:
    """What NVML says of the first GPU that CUDA may use, or what became of a library that was asked so long."""
    said, problem = child.answer("sparkctl.hardware.nvml", seconds=seconds)
    return Reading(problem=f"NVML {problem}", answered=False) if problem else Reading.of(said)


def not_loaded(library: str, error: OSError) -> str:
    """Why the loader has no such library of the driver: there is none, or in its own words."""
    if NOT_THERE in str(error) and library in str(error):
        return f"no {library}: {NO_DRIVER}"
    return f"{library} cannot be loaded: {error}"


def too_old(library: str, error: AttributeError) -> str:
    """That the library lacks a function."""
    return f"too old a driver library: {str(error).rpartition('/')[2] or library}"


def here() -> Reading:
    """The same in this process, which it may hang or end."""
    visible = env.visible_gpu()
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return Reading(problem=not_loaded(LIBRARY, error))
    if visible is None:
        return Reading(problem=HIDDEN)
    try:
        with _initialised(nvml):
            return Reading(_Asked(nvml, visible).gpu())
    except _NvmlError as error:
        return Reading(problem=str(error))
    except AttributeError as error:
        return Reading(problem=too_old(LIBRARY, error))


class _NvmlError(Exception):
    pass


@contextmanager
def _initialised(nvml: ctypes.CDLL) -> Iterator[None]:
    _check(nvml, nvml.nvmlInit_v2())
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _check(nvml: ctypes.CDLL, status: int) -> None:
    if status:
        nvml.nvmlErrorString.restype = c_char_p
        said = nvml.nvmlErrorString(status)
        raise _NvmlError(f"NVML: {said.decode().lower() if said else f'error {status}'}")


class _Asked:
    """One GPU of an initialised library."""

    def __init__(self, nvml: ctypes.CDLL, visible: str) -> None:
        self._nvml, self._handle = nvml, c_void_p()
        if visible.isdigit():
            _check(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(int(visible)), byref(self._handle)))
        else:
            _check(nvml, nvml.nvmlDeviceGetHandleByUUID(visible.encode(), byref(self._handle)))

    def gpu(self) -> Gpu:
        name, major, minor, count = create_string_buffer(96), c_int(), c_int(), c_uint()
        _check(self._nvml, self._nvml.nvmlDeviceGetName(self._handle, name, c_uint(96)))
        _check(self._nvml, self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle, byref(major), byref(minor)))
        _check(self._nvml, self._nvml.nvmlDeviceGetCount_v2(byref(count)))
        memory, driver = _Memory(), create_string_buffer(96)
        own = not self._nvml.nvmlDeviceGetMemoryInfo(self._handle, byref(memory)) and memory.total > 0
        known = not self._nvml.nvmlSystemGetDriverVersion(driver, c_uint(96))
        cuda = c_int()
        cuda_known = not self._nvml.nvmlSystemGetCudaDriverVersion_v2(byref(cuda))
        throttled = self._either("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return Gpu(
            name=name.value.decode(errors="replace"), capability=f"{major.value}.{minor.value}", count=count.value,
            driver=driver.value.decode(errors="replace") if known else None,
            cuda=(cuda.value // 1000, cuda.value % 1000 // 10) if cuda_known else None,
            memory=memory.total if own else None, used=memory.used if own else None,
            clock=self._number("nvmlDeviceGetClockInfo", c_uint, SM),
            most_clock=self._number("nvmlDeviceGetMaxClockInfo", c_uint, SM),
            memory_clock=self._number("nvmlDeviceGetClockInfo", c_uint, MEMORY),
            power=self._watts("nvmlDeviceGetPowerUsage"), power_limit=self._watts("nvmlDeviceGetEnforcedPowerLimit"),
            default_limit=self._watts("nvmlDeviceGetPowerManagementDefaultLimit"),
            temperature=self._number("nvmlDeviceGetTemperature", c_uint, 0), busy=self._busy(),
            throttled=tuple(reason for bit, reason in REASONS.items() if throttled & bit),
            processes=self._processes(),
        )  # fmt: skip

    def _number(self, function: str, kind: Any, *arguments: int) -> int | None:
        """One number; None where the library or the GPU has no such thing."""
        ask = getattr(self._nvml, function, None)
        value = kind()
        if ask is None or ask(self._handle, *(c_uint(a) for a in arguments), byref(value)):
            return None
        return int(value.value)

    def _either(self, new: str, old: str) -> int:
        """Bits, by the name that a function has since driver 535, or by its old one."""
        bits = self._number(new, c_ulonglong)
        return (self._number(old, c_ulonglong) if bits is None else bits) or 0

    def _watts(self, function: str) -> float | None:
        milliwatts = self._number(function, c_uint)
        return None if milliwatts is None else milliwatts / 1000

    def _busy(self) -> int | None:
        ask, rates = getattr(self._nvml, "nvmlDeviceGetUtilizationRates", None), _Utilization()
        return None if ask is None or ask(self._handle, byref(rates)) else int(rates.gpu)

    def _processes(self) -> tuple[Process, ...]:
        ask = getattr(self._nvml, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        found, count = (_Process * MOST_PROCESSES)(), c_uint(MOST_PROCESSES)
        if ask is None or ask(self._handle, byref(count), found) not in (0, TOO_SMALL):
            return ()
        held = (None if p.bytes == UNKNOWN else p.bytes for p in found[: min(count.value, MOST_PROCESSES)])
        return tuple(Process(p.pid, bytes) for p, bytes in zip(found, held, strict=False))


if __name__ == "__main__":
    print(json.dumps(asdict(here())))
