"""The libraries that training stands on: version, and whether they can be imported, each tried by itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from sparkctl import child
from sparkctl.progress import Progress, silent

SECONDS = 90.0  # an import over a slow disk takes a minute; unsloth's takes 40 s on a GPU
AT_ONCE = 2  # imports: each keeps a core and a disk busy
Need = Literal["always", "gpu", "choice"]


@dataclass(frozen=True)
class Library:
    """A distribution and the module to import. need: of training, of training on a GPU, or of the user's choice."""

    name: str
    module: str
    need: Need


LIBRARIES = (
    Library("torch", "torch", "always"),
    Library("triton", "triton", "gpu"),
    Library("flash-linear-attention", "fla", "gpu"),
    Library("causal-conv1d", "causal_conv1d", "choice"),
    Library("transformers", "transformers", "always"),
    Library("peft", "peft", "always"),
    Library("datasets", "datasets", "always"),
    Library("safetensors", "safetensors", "always"),
    Library("numpy", "numpy", "always"),
    Library("unsloth", "unsloth", "choice"),
    Library("bitsandbytes", "bitsandbytes", "choice"),
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
    """A library here. version: None where it is not installed. imports: None where that was not tried."""

    library: Library
    version: str | None
    imports: bool | None = None
    problem: str | None = None
    torch: Torch | None = None


def look() -> list[Installed]:
    """Every library, by its metadata alone."""
    return [Installed(library, _version(library.name)) for library in LIBRARIES]


def imported(found: list[Installed], progress: Progress = silent) -> list[Installed]:
    """The same, each tried."""
    with progress.task("importing libraries", len(found)) as task, child.at_once(AT_ONCE) as pool:

        def tried(one: Installed) -> Installed:
            result = _imported(one) if one.version else one
            task.advance()
            return result

        return list(pool.map(tried, found))


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
    said, problem = child.answer("sparkctl.doctor.importing", one.library.module, seconds=SECONDS)
    if problem:
        return Installed(one.library, one.version, False, problem)
    torch = None
    if "architectures" in said:
        torch = Torch(said["cuda"], tuple(said["architectures"]), said["available"])
    return Installed(one.library, one.version, True, torch=torch)
