"""Whether the registry has every pin of a profile, as a wheel or as a source package, for one Python and machine.

    python tools/check_pins.py [--profile unsloth] [--python 3.12] [--machine aarch64]

Every pin, wanted by this installation or not: a package that has to be built (causal-conv1d), one of the developers.
pip is asked for the versions of each and downloads nothing. `check_lock.py` asks whether they fit each other.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pins
from check_lock import place
from packaging.requirements import Requirement

AT_ONCE = 4
AVAILABLE = re.compile(r"^Available versions: (.+)$", re.MULTILINE)


def main() -> None:
    """Ask for each pin, name those that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="unsloth")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--machine", default="aarch64")
    asked = parser.parse_args()
    lock = pins.read(asked.profile, asked.python, asked.machine)
    with ThreadPoolExecutor(AT_ONCE) as several:
        answers = list(several.map(lambda name: offered(name, asked.python, asked.machine), lock))
    problems = [said for pin, answer in zip(lock.values(), answers, strict=True) if (said := problem(pin, *answer))]
    for said in problems:
        print(f"error: {said}", file=sys.stderr)
    where = f"Python {asked.python} on {asked.machine}"
    print(f"{asked.profile}, {where}: {len(lock) - len(problems)} of {len(lock)} pins are in the registry")
    sys.exit(bool(problems))


def offered(name: str, python: str, machine: str) -> tuple[list[str], str]:
    """The versions of a package that could be installed there, newest first; pip's complaint where there are none."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", "--pre", name]
    done = subprocess.run([*command, *place(python, machine)], capture_output=True, text=True)
    found = AVAILABLE.search(done.stdout)
    return (found.group(1).split(", "), "") if found else ([], done.stderr.strip())


def problem(pin: Requirement, versions: list[str], complaint: str) -> str | None:
    """What is wrong with a pin, given what the registry has."""
    if any(pin.specifier.contains(version, prereleases=True) for version in versions):
        return None
    if not versions:
        return f"no {pin.name} at all: {complaint.splitlines()[-1] if complaint else 'no answer'}"
    return f"no {pin.name}{pin.specifier} among {', '.join(versions[:5])}"


if __name__ == "__main__":
    main()
