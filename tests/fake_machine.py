"""Machines that are not here: drivers built from tests/drivers, libraries as empty packages, hidden ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parent / "drivers"
LIBRARIES = {"cuda": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}


def build(folder: Path, *flags: str) -> Path:
    """Both drivers in `folder`, against the cuda.h that Triton carries: its structs are NVIDIA's. flags: for cc."""
    triton = find_spec("triton")
    assert triton
    assert triton.origin
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    for source, library in LIBRARIES.items():
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-w",
            f"-I{headers}",
            *flags,
            "-o",
            folder / library,
            SOURCES / f"{source}.c",
        ]
        subprocess.run(command, check=True)
    return folder


def package(folder: Path, name: str, version: str, body: str = "", requires: tuple[str, ...] = ()) -> None:
    """An installed distribution whose module runs `body` when it is imported."""
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(f'__version__ = "{version}"\n{textwrap.dedent(body)}')
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")


def hide(folder: Path, *names: str) -> None:
    """Make every process with `folder` on PYTHONPATH believe that these modules and distributions are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""\
        import importlib.metadata as metadata
        from importlib.machinery import PathFinder

        HIDDEN = {names!r}
        distribution, module = metadata.Distribution.from_name, PathFinder.find_spec


        def from_name(name):
            if name in HIDDEN:
                raise metadata.PackageNotFoundError(name)
            return distribution(name)


        def find_spec(name, path=None, target=None):
            return None if name.partition(".")[0] in HIDDEN else module(name, path, target)


        metadata.Distribution.from_name, PathFinder.find_spec = staticmethod(from_name), staticmethod(find_spec)
        """)
    )


def sparkctl(
    *arguments: str, drivers: Path | None = None, packages: Path | None = None, timeout: float | None = None,
    **variables: str,
) -> Any:  # fmt: skip
    """(exit status, the JSON it printed, stderr) of the command on such a machine."""
    environment = {**os.environ, **variables}
    if drivers:
        environment["LD_LIBRARY_PATH"] = str(drivers)
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "sparkctl", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def no_drivers(folder: Path) -> Path:
    """The folder with files that are no libraries in their places: no GPU is seen then, on any machine."""
    for library in LIBRARIES.values():
        (folder / library).write_text("no library")
    return folder


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two drivers."""
    return build(tmp_path_factory.mktemp("drivers"))


def quick(drivers: Path, packages: Path, **variables: str) -> tuple[int, Any, str]:
    """A look at a Spark whose libraries are all right but for what is changed."""
    return sparkctl("doctor", "--quick", drivers=drivers, packages=packages, **variables)


@pytest.fixture
def spark(tmp_path: Path) -> Path:
    """The libraries of a Spark: a torch for CUDA in the place of this machine's."""
    folder = tmp_path / "packages"
    package(folder, "torch", "2.11.0a0+eb65b36")
    (folder / "torch" / "version.py").write_text("cuda = '13.1'\n")
    return folder
