"""The project's description and its lock: they name what is imported, and fit each other."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution

import pytest
from check_lock import PLACES
from environment import EXTRAS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pins import LOCKS, lines, read
from pins import version as pinned
from sources import ROOT, files, imports, tree

from sparkctl import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION = {"fla": "flash-linear-attention", "yaml": "pyyaml"}  # where the import's name is another
OURS = {"sparkctl", "sparkctl_kernels"}


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    optional = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]


def names(*extras: str) -> set[str]:
    """Their normalised names."""
    return {canonicalize_name(requirement.name) for requirement in requirements(*extras)}


def pins(profile: str, python: str = "3.11", machine: str = "x86_64") -> dict[str, Requirement]:
    """The lock of a profile there."""
    return read(profile, python, machine)


every_place = pytest.mark.parametrize(
    ("profile", "python", "machine"), [(profile, *place) for profile, places in PLACES.items() for place in places]
)


@every_place
def test_every_pin_is_in_the_range_that_is_asked_for(profile: str, python: str, machine: str) -> None:
    lock = pins(profile, python, machine)
    for requirement in requirements(*EXTRAS[profile], "dev"):
        if str(requirement.specifier).startswith("=="):
            assert canonicalize_name(requirement.name) not in lock  # pinned there already, stated once
            continue
        pin = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned(pin)), f"{pin} is not in {requirement}"


@every_place
def test_the_lock_is_whole(profile: str, python: str, machine: str) -> None:
    """Everything that is asked for is pinned, through all that is installed here: nothing floats."""
    lock, seen = pins(profile, python, machine), set()
    ahead = list(names())
    while ahead:
        name = ahead.pop()
        if name not in seen and not name.startswith(("nvidia-", "cuda-")):
            seen.add(name)
            needed = [Requirement(line) for line in distribution(name).requires or []]
            ahead += [
                canonicalize_name(one.name)
                for one in needed
                if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    assert seen - set(lock) == set()


def test_what_the_profiles_share_is_stated_once() -> None:
    base = {canonicalize_name(Requirement(line).name) for line in lines(LOCKS / "base.txt")}
    cpu, cuda, unsloth = pins("cpu"), pins("cuda", "3.12"), pins("unsloth", "3.12")
    differ = {name for name in cpu.keys() & unsloth.keys() if str(cpu[name]) != str(unsloth[name])}
    assert differ == {"datasets", "fsspec", "numpy", "setuptools", "torch", "triton"}
    assert base & differ == set()
    assert {str(cpu[name]) == str(cuda[name]) for name in ("datasets", "fsspec")} == {True}


def test_what_fits_together() -> None:
    """Facts about other projects' releases that no resolver was asked about here."""
    cpu, cuda, unsloth = pins("cpu"), pins("cuda", "3.12"), pins("unsloth", "3.12")
    assert pinned(cpu["torch"]) == "2.13.0"
    assert pinned(cpu["triton"]) == "3.7.1"  # what torch 2.13 requires; its interpreter works with numpy 2.4
    assert Version(pinned(cpu["numpy"])) < Version("2.5")
    assert {pinned(lock["triton"]) for lock in (cuda, unsloth)} == {"3.6.0"}  # the Spark's
    assert {pinned(lock["transformers"]) for lock in (cpu, cuda, unsloth)} == {"5.17.0"}  # the last for Unsloth
    assert pinned(unsloth["datasets"]) == "4.8.5"
    assert Version(pinned(cpu["datasets"])).major == 5
    assert Version(pinned(unsloth["trl"])) <= Version("1.15.0")


def test_a_torch_that_an_image_brings_stays() -> None:
    """NVIDIA's builds are pre-releases with a local part: neither the range nor the pin may replace them."""
    image = Version("2.11.0a0+a6c236b9fd.nv26.3.46836102")
    (asked,) = (one for one in requirements() if one.name == "torch")
    assert asked.specifier.contains(image, prereleases=True)
    assert pins("cuda", "3.12")["torch"].specifier.contains(image, prereleases=True)
    assert pins("cuda", "3.12")["triton"].specifier.contains(Version("3.6.0+git5d72932fc5.nv26.3"))


def third_party(*folders: str) -> set[str]:
    """Distributions that the sources in these folders import."""
    own = OURS | {file.stem for file in files("tests", "tools", "docker")} | sys.stdlib_module_names
    read = [file for file in files(*folders) if file.parent.name != "real"]  # tests/real: each brings its own data
    found = {name.split(".")[0] for file in read for name in imports(tree(file))} - own
    return {canonicalize_name(DISTRIBUTION.get(name, name)) for name in found}


def test_what_is_imported_is_declared() -> None:
    assert third_party("sparkctl", "kernels") - names(*EXTRAS["unsloth"]) == set()
    assert third_party("tools", "docker") - names("cuda", "conv") - {"vllm"} == set()  # vllm: an environment of its own
    assert third_party("tests") - names("dev") == set()


def test_what_is_declared_is_imported() -> None:
    assert names("cuda") - third_party("sparkctl", "kernels") == set()


def test_the_version_is_stated_alike() -> None:
    assert PROJECT["version"] == __version__ == distribution("dgx-sparkctl").version


def test_what_decides_whether_the_code_is_clean_is_pinned() -> None:
    exact = {one.name for one in requirements("dev") if str(one.specifier).startswith("==")}
    assert {"ruff", "mypy"} <= exact
