"""The libraries that training stands on: version, and whether they can be imported, each tried by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparkctl import child
from sparkctl.hardware import software
from sparkctl.hardware.machine import available_cores
from sparkctl.progress import Progress, silent

SECONDS = 90.0  # an import over a slow disk takes a minute; unsloth's takes 40 s on a GPU
LEAST, MOST, CORES = 2, 4, 4  # imports at once, and the cores for each: it keeps one and a disk busy
SLOWEST = "unsloth"  # whose import compiles and patches: it begins first
TORCH = "torch"
ROOTS = ("numpy", TORCH)  # that others stand on: tried first, in this order
Need = Literal["always", "gpu", "choice"]


@dataclass(frozen=True)
class Library:
    """A distribution and the module to import. need: of training, of training on a GPU, or of the user's choice.

    on: the one whose import its own begins with.
    """

    name: str
    module: str
    need: Need
    on: str | None = None


LIBRARIES = (
    Library("torch", "torch", "always", on="numpy"),
    Library("triton", "triton", "gpu"),
    Library("flash-linear-attention", "fla", "gpu", on="torch"),
    Library("causal-conv1d", "causal_conv1d", "choice", on="torch"),
    Library("transformers", "transformers", "always", on="numpy"),
    Library("peft", "peft", "always", on="torch"),
    Library("datasets", "datasets", "always", on="numpy"),
    Library("safetensors", "safetensors", "always"),
    Library("numpy", "numpy", "always"),
    Library("unsloth", "unsloth", "choice", on="torch"),
    Library("bitsandbytes", "bitsandbytes", "choice", on="torch"),
)
BESIDE = ("trl", "unsloth-zoo")  # whose versions and pins count, without a row


@dataclass(frozen=True)
class Torch:
    """How torch was built. cuda: None for a CPU build; architectures: of its kernels, as sm_120 or compute_120."""

    cuda: str | None
    architectures: tuple[str, ...]
    available: bool


@dataclass(frozen=True)
class Installed:
    """A library here. version: None where it is not installed. imports: None where that was not tried.

    problem: why it cannot be imported, or was not tried.
    """

    library: Library
    version: str | None
    imports: bool | None = None
    problem: str | None = None
    torch: Torch | None = None


def look() -> list[Installed]:
    """Every library, by its metadata alone."""
    return [Installed(library, software.installed(library.name)) for library in LIBRARIES]


def rooted(found: list[Installed], progress: Progress = silent) -> list[Installed]:
    """The same, with numpy tried: all but a few stand on it, and torch."""
    with progress.task(f"importing {ROOTS[0]}"):
        return [_imported(one) if one.library.name == ROOTS[0] else one for one in found]


def imported(found: list[Installed], progress: Progress = silent) -> list[Installed]:
    """The same, each tried that was not yet, ROOTS first; what stands on one that fails is not tried."""
    known = _roots(found)
    with progress.task("importing libraries", len(found)) as task, child.at_once(at_once()) as pool:
        names: list[str] = []

        def tried(one: Installed) -> Installed:
            names.append(one.library.name)
            task.note(", ".join(names))
            result = _tried(one, known)
            names.remove(one.library.name)
            task.note(", ".join(names))
            task.advance()
            return result

        order = sorted(found, key=lambda one: one.library.name != SLOWEST)
        results = dict(zip((one.library.name for one in order), pool.map(tried, order), strict=True))
    return [results[one.library.name] for one in found]


def _roots(found: list[Installed]) -> dict[str, Installed]:
    known: dict[str, Installed] = {}
    there = (one for one in found if one.library.name in ROOTS)
    for one in sorted(there, key=lambda one: ROOTS.index(one.library.name)):
        known[one.library.name] = _tried(one, known)
    return known


def _tried(one: Installed, roots: Mapping[str, Installed]) -> Installed:
    """The library, imported unless it was before or stands on a root that fails."""
    one = roots.get(one.library.name, one)
    if one.version is None or one.imports is not None or one.problem:
        return one
    root = roots.get(one.library.on or "")
    why = why_not(root) if root else None
    return replace(one, problem=why) if why else _imported(one)


def why_not(root: Installed) -> str | None:
    """Why nothing that stands on it is tried; None where it can be imported."""
    if root.imports:
        return None
    if root.version is None:
        return f"not tried: {root.library.name} is not installed"
    return root.problem if root.imports is None else f"not tried: {root.library.name} cannot be imported"


def at_once() -> int:
    """Imports that this machine does beside everything else."""
    return min(max(available_cores() // CORES, LEAST), MOST)


def ready(found: list[Installed], name: str) -> bool:
    """Whether a library is installed and what it stands on can be imported."""
    roots = {one.library.name: one for one in found}
    one = roots.get(name)
    root = roots.get((one.library.on if one else None) or "")
    return one is not None and one.version is not None and (root is None or why_not(root) is None)


def answered(found: list[Installed], facts: dict[str, Any] | None, problem: str | None) -> list[Installed]:
    """The same, with torch as a process that imported it said it, or the problem that kept it from saying so."""
    return [_torch(one, facts, problem) if one.library.name == TORCH else one for one in found]


def _torch(one: Installed, facts: dict[str, Any] | None, problem: str | None) -> Installed:
    if facts is None:
        return replace(one, imports=False, problem=problem or "ended without an answer")
    return replace(one, imports=True, torch=Torch(facts["cuda"], tuple(facts["architectures"]), facts["available"]))


def versions(found: list[Installed]) -> dict[str, str]:
    """Of these, and of those that rules ask of; what is not installed, or does not say, is not in it."""
    named = {one.library.name: one.version for one in found} | {name: software.installed(name) for name in BESIDE}
    return {name: version for name, version in named.items() if version and version != software.UNREADABLE}


def requirements() -> dict[str, list[str]]:
    """What each of them asks of others, as its metadata says it."""
    return {name: software.requirements(name) for name in (*(one.name for one in LIBRARIES), *BESIDE)}


def _imported(one: Installed) -> Installed:
    if one.version is None:
        return one
    said, problem = child.answer("sparkctl.doctor.importing", one.library.module, seconds=SECONDS)
    if problem:
        return replace(one, imports=False, problem=problem)
    return _torch(one, said, None) if one.library.name == TORCH else replace(one, imports=True)
