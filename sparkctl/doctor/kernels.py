"""Every Triton kernel of this project at every configuration, compiled for a target without its GPU."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from sparkctl_kernels.limits import SHARED

from sparkctl import child
from sparkctl.doctor.ptx import TOO_NEW
from sparkctl.doctor.rules import CUDA_EXTRA
from sparkctl.doctor.targets import GB10, spelled
from sparkctl.errors import SparkError, UsageError

MODULE = "sparkctl_kernels.compiled"  # it puts a driver without a device in Triton's place: a process of its own
EXTRAS = {"torch": "pip install dgx-sparkctl", "triton": CUDA_EXTRA}  # what installs them
SECONDS = 580.0  # of a cold cache on two slow cores


@dataclass(frozen=True)
class Kernel:
    """One configuration. shared: bytes a block; stack: bytes that a thread keeps in memory for want of registers;
    in_loops: instructions in loops that go there; instructions: those that matter, and how many.
    """

    kernel: str
    shape: str
    constants: str
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    in_loops: int | None
    dot: bool
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """The constants that differ from nothing: names of those that are on, and values."""
        pairs = [pair.split("=", 1) for pair in self.constants.split()]
        return " ".join(name if value == "True" else f"{name}={value}" for name, value in pairs if value != "False")


@dataclass(frozen=True)
class Compiled:
    """All of them for one target. shared: bytes that a block may have; faults: sentences."""

    target: str
    shared: int
    kernels: list[Kernel]
    faults: list[str]


def compile_all(target: str | None) -> Compiled:
    """Compile for the target, a GB10 where none is named.

    Raises UsageError at a target that kernels are not judged for, SparkError where compiling itself fails.
    """
    name = str(GB10) if target is None else spelled(target)
    if name not in SHARED:
        raise UsageError(
            f"kernels are compiled for {', '.join(SHARED)}, not for `{name}`",
            f"sparkctl doctor --kernels --target {GB10}",
        )
    ended = child.module(MODULE, name, "--json", seconds=SECONDS)
    said = _answer(ended.out)
    if said is None:
        problem = _said_by_ptxas(ended.err) or ended.problem or "no answer"
        raise SparkError(f"the kernels could not be compiled for {name}: {problem}", _mend(name, problem))
    return Compiled(name, SHARED[name], [Kernel(**row) for row in said["kernels"]], said["faults"])


def _said_by_ptxas(err: str) -> str | None:
    """Why it made nothing; behind that Triton puts its own words and a command line."""
    said = re.search(r"^ptxas fatal\s*: (.+)$", err, re.MULTILINE)
    return f"ptxas: {said[1].strip()}" if said else None


def _mend(name: str, problem: str) -> str:
    """What installs the library that is missing, names a ptxas that knows the target, or shows all of the problem."""
    if TOO_NEW.search(problem):
        return f"sparkctl doctor --target {name}"
    missing = re.search(r"No module named '(\w+)", problem)
    if missing and missing[1] in EXTRAS:
        return EXTRAS[missing[1]]
    return f"`python -m {MODULE} {name}` shows all of it"


def _answer(out: str) -> dict[str, Any] | None:
    """What it printed: it ends with status 1 where it found faults, and has an answer all the same."""
    lines = out.strip().splitlines()
    try:
        said = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
