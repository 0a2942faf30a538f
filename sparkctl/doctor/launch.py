"""Probes launched, and the driver asked, in a process of its own: `python -m sparkctl.doctor.launch < request.json`.

A kernel that traps takes its context with it, one that hangs its process: neither costs more than one answer.
The request is {} for the driver's facts, or a kernel; the answer is one JSON object on stdout.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from typing import Any

from sparkctl import child
from sparkctl.doctor.driver import LIBRARY, Driver, DriverError
from sparkctl.hardware.nvml import not_loaded, too_old

SECONDS = 15.0  # a context takes one, a probe milliseconds
# failures of the machine rather than of the kernel
NEVER = {
    "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_INVALID_DEVICE",
    "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_OPERATING_SYSTEM", "CUDA_ERROR_NOT_PERMITTED",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_NO_BINARY_FOR_GPU",
}  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """What a probe wrote. problem: why it wrote nothing; never: it was not even started."""

    words: tuple[int, ...] = ()
    problem: str | None = None
    never: bool = False


@dataclass(frozen=True)
class Claims:
    """What CUDA's driver says. driver: (13, 0), the newest CUDA it runs; bytes as it claims them. problem: of any."""

    capability: str | None = None
    driver: tuple[int, int] | None = None
    free: int | None = None
    total: int | None = None
    integrated: bool | None = None
    shared: int | None = None
    registers: int | None = None
    problem: str | None = None


def launch(cubin: bytes, *, words: int, threads: int, cluster: int, shared: int) -> Launched:
    """Run a probe's kernel on the first visible GPU."""
    request = dict(cubin=base64.b64encode(cubin).decode(), words=words, threads=threads, cluster=cluster, shared=shared)
    said, problem = _ask(request, SECONDS)
    if problem:
        return Launched(problem=problem)
    error = said.get("error")
    return Launched(tuple(said.get("words", ())), error, error in NEVER or "library" in said)


def claims(seconds: float = SECONDS) -> Claims:
    """What CUDA's driver says of the first visible GPU."""
    said, problem = _ask({}, seconds)
    if problem:
        return Claims(problem=problem)
    error = said.pop("error", None)
    said.pop("library", None)
    driver = said.pop("driver", None)
    return Claims(**said, driver=(driver // 1000, driver % 1000 // 10) if driver else None, problem=error)


def _ask(request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], str | None]:
    return child.answer("sparkctl.doctor.launch", seconds=seconds, input=json.dumps(request))


def main() -> None:
    """Answer the request on stdin."""
    request, answer = json.load(sys.stdin), dict[str, Any]()
    try:
        if request:
            answer["words"] = Driver().launch(base64.b64decode(request.pop("cubin")), **request)
        else:
            _facts(answer)
    except OSError as error:
        answer |= dict(error=not_loaded(LIBRARY, error), library=False)
    except AttributeError as error:
        answer |= dict(error=too_old(LIBRARY, error), library=False)
    except DriverError as error:
        answer["error"] = error.name
    print(json.dumps(answer))


def _facts(answer: dict[str, Any]) -> None:
    """What can be said, in the order in which it may fail."""
    driver = Driver(context=False)
    answer["driver"] = driver.version()
    answer["capability"] = f"{driver.attribute('major')}.{driver.attribute('minor')}"
    answer["integrated"] = bool(driver.attribute("integrated"))
    answer["shared"], answer["registers"] = driver.attribute("shared"), driver.attribute("registers")
    answer["free"], answer["total"] = Driver().memory()


if __name__ == "__main__":
    main()
