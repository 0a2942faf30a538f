"""GPU architectures by the names that ptxas gives them: sm_121a is a DGX Spark's GB10, sm_90a Hopper."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparkctl.errors import UsageError

# bytes of shared memory that one block may have, by CUDA's occupancy tables
SHARED = {
    80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 110: 232_448,
    120: 101_376, 121: 101_376,
}  # fmt: skip
SINCE = {90: "12.0", 100: "12.8", 103: "12.9", 110: "13.0", 120: "12.8", 121: "12.9"}  # whose ptxas knows them first
PTX = {100: "8.6", 103: "8.8", 110: "9.0", 120: "8.7", 121: "8.8"}  # the first version of PTX for them
EARLIEST_PTX = "8.0"
FAMILY_SINCE, FAMILY_PTX = "12.9", "8.8"  # the first of both for `f`


@dataclass(frozen=True)
class Target:
    """One architecture. suffix: `a` its own instructions too, `f` its family's, `` what all later ones have."""

    number: int
    suffix: str = ""

    def __str__(self) -> str:
        return f"sm_{self.number}{self.suffix}"

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block may have."""
        return SHARED[self.number]

    @property
    def release(self) -> str:
        """The CUDA release whose ptxas is the first that knows it."""
        own = SINCE.get(self.number, "11.8")
        return max(own, FAMILY_SINCE, key=_order) if self.suffix == "f" else own

    @property
    def ptx(self) -> str:
        """The first version of PTX that has it."""
        own = PTX.get(self.number, EARLIEST_PTX)
        return max(own, FAMILY_PTX, key=_order) if self.suffix == "f" else own

    @property
    def own(self) -> bool:
        """Whether it has the instructions that later architectures need not have."""
        return bool(self.suffix)


def _order(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


GB10, HOPPER = Target(121, "a"), Target(90, "a")
BESIDE = (GB10, Target(121), Target(120, "a"), Target(100, "a"), HOPPER)  # a table for one shows these beside it


def spelled(name: str) -> str:
    """The name as Triton and ptxas spell it."""
    return name.strip().lower()


def parse(name: str) -> Target:
    """The target of that name. Raises UsageError where there is none."""
    found = re.fullmatch(r"sm_(\d+)([af]?)", spelled(name))
    target = Target(int(found[1]), found[2]) if found else None
    first = {"a": 90, "f": 100}
    if target is None or target.number not in SHARED or target.number < first.get(target.suffix, 0):
        known = ", ".join(f"sm_{number}{'a' if number >= 90 else ''}" for number in SHARED)
        raise UsageError(f"unknown target `{name}`; there are {known}", f"a DGX Spark is `--target {GB10}`")
    return target


def of_capability(capability: str) -> Target | None:
    """The target that a GPU of compute capability "12.1" is compiled for; None where it is not known."""
    number = int(capability.replace(".", ""))
    return Target(number, "a" if number >= 90 else "") if number in SHARED else None
