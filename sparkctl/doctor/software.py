"""The libraries that training stands on: version, and whether they can be imported, each tried by itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

from sparkctl import child
from sparkctl.hardware.machine import available_cores
from sparkctl.progress import Progress, silent

SECONDS = 90.0  # an import over a slow disk takes a minute; unsloth's takes 40 s on a GPU
LEAST, MOST, CORES = 2, 4, 4  # imports at once, and the cores for each: it keeps one and a disk busy
SLOWEST = "unsloth"  # whose import compiles and patches: it begins first
TORCH = "torch"
NOT_TRIED = "not tried: torch"
Need = Literal["always", "gpu", "choice"]


@dataclass(frozen=True)
class Library:
    """A distribution and the module to import. need: of training, of training on a GPU, or of the user's choice.

    on_torch: its import imports torch.
    """

    name: str
    module: str
    need: Need
    on_torch: bool = False


LIBRARIES = (
    Library("torch", "torch", "always"),
    Library("triton", "triton", "gpu"),
    Library("flash-linear-attention", "fla", "gpu", on_torch=True),
    Library("causal-conv1d", "causal_conv1d", "choice", on_torch=True),
    Library("transformers", "transformers", "always"),
    Library("peft", "peft", "always", on_torch=True),
    Library("datasets", "datasets", "always"),
    Library("safetensors", "safetensors", "always"),
    Library("numpy", "numpy", "always"),
    Library("unsloth", "unsloth", "choice", on_torch=True),
    Library("bitsandbytes", "bitsandbytes", "choice", on_torch=True),
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
    return [Installed(library, _version(library.name)) for library in LIBRARIES]


def imported(
    found: list[Installed], progress: Progress = silent, torch: Installed | None = None
) -> list[Installed]:  # fmt: skip
    """The same, each tried; torch first, and what stands on it is not tried where it fails. torch: as tried before."""
    first = torch or next((_imported(one) for one in found if one.library.name == TORCH), None)
    why = _why_not(first) if first else None
    with progress.task("importing libraries", len(found)) as task, child.at_once(at_once()) as pool:
        names: list[str] = []

        def tried(one: Installed) -> Installed:
            if first and one.library.name == TORCH:
                result = first
            elif why and one.library.on_torch and one.version:
                result = replace(one, problem=why)
            else:
                names.append(one.library.name)
                task.note(", ".join(names))
                result = _imported(one)
                names.remove(one.library.name)
                task.note(", ".join(names))
            task.advance()
            return result

        order = sorted(found, key=lambda one: one.library.name != SLOWEST)
        results = dict(zip((one.library.name for one in order), pool.map(tried, order), strict=True))
    return [results[one.library.name] for one in found]


def at_once() -> int:
    """Imports that this machine does beside everything else."""
    return min(max(available_cores() // CORES, LEAST), MOST)


def _why_not(torch: Installed) -> str | None:
    """Why nothing that stands on torch is tried."""
    if torch.version is None:
        return f"{NOT_TRIED} is not installed"
    return None if torch.imports else f"{NOT_TRIED} cannot be imported"


def of_answer(torch: Installed, facts: dict[str, Any] | None, problem: str | None) -> Installed:
    """torch as a process that imported it said it, or the problem that kept it from saying so."""
    if facts is None:
        return replace(torch, imports=False, problem=problem or "ended without an answer")
    return replace(torch, imports=True, torch=Torch(facts["cuda"], tuple(facts["architectures"]), facts["available"]))


def versions(found: list[Installed]) -> dict[str, str]:
    """Of these, and of those that rules ask of; what is not installed is not in it."""
    named = {one.library.name: one.version for one in found} | {name: _version(name) for name in BESIDE}
    return {name: version for name, version in named.items() if version}


def requirements() -> dict[str, list[str]]:
    """What each of them asks of others, as its metadata says it."""
    found: dict[str, list[str]] = {}
    for name in (*(library.name for library in LIBRARIES), *BESIDE):
        with suppress(PackageNotFoundError):
            found[name] = requires(name) or []
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _imported(one: Installed) -> Installed:
    if one.version is None:
        return one
    said, problem = child.answer("sparkctl.doctor.importing", one.library.module, seconds=SECONDS)
    if problem:
        return replace(one, imports=False, problem=problem)
    return of_answer(one, said, None) if one.library.name == TORCH else replace(one, imports=True)
