"""What pip installs into an image and under which constraints: pyproject.toml, the lock, and what NVIDIA built.

    PYTHONPATH=tools python3 docker/constraints.py PROFILE EXTRA,EXTRA FOLDER

Writes requirements.txt, constraints.txt and base.json into FOLDER. Run by the base image's own Python: a package of
the lock that the image has in a build of its own (torch 2.11.0a0+a6c236b9fd.nv26.3.46836102; torchvision, torchao and
triton likewise) is constrained to that build, so that pip leaves it alone.
"""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
FOR = ("torch", "triton")  # the lock was tested with these; what else NVIDIA builds goes with its torch


def main() -> None:
    """Read, compare, write."""
    profile, extras, folder = sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3])
    python = ".".join(platform.python_version_tuple()[:2])
    lock = pins.read(profile, python, platform.machine())
    own = {name: version for name, version in own_builds().items() if name in lock}
    problems = unfit(lock, own)
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(extras)))
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in constraints(lock, own)))
    (folder / "base.json").write_text(json.dumps(own, indent=2) + "\n")


def own_builds() -> dict[str, str]:
    """Name → version of what is installed in a build that no registry has: its version has a local part."""
    found = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    return {name: version for name, version in found.items() if "+" in version}


def unfit(lock: dict[str, Requirement], own: dict[str, str]) -> list[str]:
    """What is wrong with a base image for this lock."""
    problems = [f"the base image has no {name} of its own build" for name in FOR if name not in own]
    return problems + [
        f"the base image has {name} {own[name]}, the lock is for {lock[name].specifier}"
        for name in FOR
        if name in own and not lock[name].specifier.contains(own[name], prereleases=True)
    ]


def requirements(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for with these extras, and what building the project needs."""
    described = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    project = described["project"]
    optional = [line for extra in extras if extra for line in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *optional, *described["build-system"]["requires"]]


def constraints(lock: dict[str, Requirement], own: dict[str, str]) -> list[str]:
    """The lock's pins, but for the base's own builds, which stay."""
    return [f"{name}=={own[name]}" if name in own else f"{name}{pin.specifier}" for name, pin in lock.items()]


if __name__ == "__main__":
    main()
