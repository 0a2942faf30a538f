"""What the Makefile's targets need, installed once and remembered; where nothing changed, no registry is asked.

    environment.py venv [--profile auto|cpu|cuda|unsloth] [--dev]   .venv: the project, editable, by the lock
    environment.py folder NAME [--lock FILE] REQUIREMENT…           .compat/NAME: these alone, for PYTHONPATH
    environment.py apart NAME --lock FILE                           .compat/NAME: an environment of its own, the lock's
                                                                    packages and none besides

A file in each says what is installed, or that pip is at work: so an interrupted installation is begun anew.
Runs on any Python from 3.11 on, with nothing installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
FOLDERS = ROOT / ".compat"
STATE = "sparkctl-environment.json"
INSTALLING = {"installing": True}  # the state while pip works: found by a later run, it means an interruption
EXTRAS: dict[str, list[str]] = {"cpu": [], "cuda": ["cuda"], "unsloth": ["cuda", "unsloth"]}  # a profile's extras


def main() -> None:
    """Parse, wait for another one at work here, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("venv")
    one.add_argument("--profile", choices=["auto", *EXTRAS], default="auto")
    one.add_argument("--dev", action="store_true")
    other = kinds.add_parser("folder")
    other.add_argument("name")
    other.add_argument("--lock", type=Path)
    other.add_argument("requirements", nargs="+")
    third = kinds.add_parser("apart")
    third.add_argument("name")
    third.add_argument("--lock", type=Path, required=True)
    options = parser.parse_args()
    try:
        with alone():
            if options.kind == "venv":
                venv(options.profile if options.profile != "auto" else profile_of_machine(), options.dev)
            elif options.kind == "apart":
                apart(options.name, options.lock)
            else:
                folder(options.name, options.requirements, options.lock)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[:4]))
        sys.exit(f"error: `{command} …` failed\nhint: mend what it says above, then run the same make again")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def alone() -> Iterator[None]:
    """One installation at a time; the lock goes with its process."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def venv(profile: str, dev: bool) -> None:
    """`.venv` for this profile, with the development tools where asked for; anew where it is broken or another's."""
    base = {"python": list(sys.version_info[:2]), "profile": profile, "root": str(ROOT)}
    project = {"base": base, "files": digest()}
    state = read_state(VENV)
    if not usable(state, base):
        # on a machine with a GPU a PyTorch that came with it (NVIDIA's images) shows through
        create(VENV, through=profile != "cpu" and importlib.util.find_spec("torch") is not None)
        state = {}
    lock = ["-c", str(ROOT / "locks" / f"{profile}.txt")]
    if state.get("project") != project:
        extras = ",".join(EXTRAS[profile])
        write_state(VENV, INSTALLING)
        pip([*lock, "-e", f".[{extras}]" if extras else "."], f"sparkctl into .venv, profile {profile}")
        state = {"project": project}
        write_state(VENV, state)
    if dev and state.get("dev") != project:
        write_state(VENV, INSTALLING)
        pip([*lock, *extra("dev")], "the development tools into .venv")
        write_state(VENV, {**state, "dev": project})


def folder(name: str, requirements: list[str], lock: Path | None) -> None:
    """`.compat/NAME` with these packages and none of their dependencies, made aside and renamed when whole."""
    target = FOLDERS / name
    state = {
        "python": list(sys.version_info[:2]),
        "requirements": requirements,
        "lock": lock and hashlib.sha256(lock.read_bytes()).hexdigest(),
    }
    if read_state(target) == state:
        return
    part = FOLDERS / f"{name}.part"
    for old in (part, target):
        shutil.rmtree(old, ignore_errors=True)
    constraints = ["-c", str(lock)] if lock else []
    pip([*constraints, "--no-deps", "--target", str(part), *requirements], f"{' '.join(requirements)} into {target}")
    write_state(part, state)
    part.rename(target)


def apart(name: str, lock: Path) -> None:
    """`.compat/NAME` as an environment of its own: what the lock pins, its dependencies left to the lock as well."""
    target = FOLDERS / name
    state = {
        "python": list(sys.version_info[:2]),
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest(),
        "root": str(ROOT),  # its commands name their interpreter by its path
    }
    if read_state(target) == state and answers(target / "bin" / "python"):
        return
    create(target)
    write_state(target, INSTALLING)
    pip(["--no-deps", "-r", str(lock)], f"{lock.name} into {target}", target / "bin" / "python")
    write_state(target, state)


def profile_of_machine() -> str:
    """`cuda` where the driver shows a GPU."""
    command = shutil.which("nvidia-smi")
    shown = subprocess.run([command, "-L"], capture_output=True, text=True).stdout if command else ""
    return "cuda" if "GPU" in shown else "cpu"


def digest() -> str:
    """What decides an installation: the project's description and all locks."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "locks").glob("*.txt"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def extra(name: str) -> list[str]:
    """The requirements of an extra: installed by themselves, the project is not touched while a command of it runs."""
    described: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements: list[str] = described["project"]["optional-dependencies"][name]
    return requirements


def usable(state: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether what is in `.venv` can be built upon: it runs, nothing was interrupted, and it is for this Python,
    profile and place. One made by hand (no state) is built upon as well."""
    if state == INSTALLING or state.get("project", {}).get("base", base) != base:
        return False
    return answers(PYTHON) == str(base["python"])


def answers(python: Path) -> str:
    """The version of an environment's interpreter, "[3, 11]"; empty where it does not run or has no pip."""
    code = "import pip, sys; print(list(sys.version_info[:2]) if sys.prefix != sys.base_prefix else '')"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def create(where: Path, through: bool = False) -> None:
    """An empty environment. through: the packages of the Python that makes it are seen in it."""
    options = ["--clear", *["--system-site-packages"] * through]
    base = getattr(sys, "_base_executable", sys.executable)  # where .venv is active, it is removed under us
    subprocess.run([base, "-m", "venv", *options, str(where)], check=True)


def pip(arguments: list[str], what: str, python: Path = PYTHON) -> None:
    """`pip install`, told to stderr. PIP_CONSTRAINT, which NVIDIA's images set, would overrule the lock."""
    print(f"installing {what}", file=sys.stderr)
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *quiet, *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def read_state(where: Path) -> dict[str, Any]:
    """What is installed there; empty where that is unknown."""
    try:
        state = json.loads((where / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(where: Path, state: dict[str, Any]) -> None:
    """Replaced whole."""
    part = where / f"{STATE}.part"
    part.write_text(json.dumps(state, indent=2) + "\n")
    part.replace(where / STATE)


if __name__ == "__main__":
    main()
