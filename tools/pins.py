"""The lock, read: which pin of a profile counts on which Python and machine."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).resolve().parents[1] / "locks"


def read(profile: str, python: str, machine: str) -> dict[str, Requirement]:
    """Name → pin of a profile as pip reads it there. Raises ValueError where a name is pinned twice."""
    where = {"python_version": python, "platform_machine": machine, "sys_platform": "linux"}
    found: dict[str, Requirement] = {}
    for line in lines(LOCKS / f"{profile}.txt"):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if requirement.marker is None or requirement.marker.evaluate(where):
            if name in found:
                raise ValueError(f"{name} is pinned twice in {profile}")
            found[name] = requirement
    return found


def lines(file: Path) -> list[str]:
    """The requirement lines of a constraints file and of those that it names."""
    found: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-c "):
            found += lines(file.parent / line.removeprefix("-c "))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


def version(pin: Requirement) -> str:
    """The version that a pin names; of a range `==2.11.*` its first."""
    (one,) = pin.specifier
    return re.sub(r"\.\*$", ".0", one.version)
