"""Versions that are wrong together, or wrong for a device: each rule with where it is known from, and its mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparkctl.doctor.findings import Finding, Weight
from sparkctl.doctor.ptx import BLACKWELL as BLACKWELL_PTXAS
from sparkctl.doctor.ptx import Assembler
from sparkctl.doctor.software import Installed, Library, Torch
from sparkctl.doctor.targets import Target
from sparkctl.hardware.software import UNREADABLE

FLA, TRITON = "https://github.com/fla-org/flash-linear-attention", "https://github.com/triton-lang/triton"
TRANSFORMERS, PYTORCH = "https://github.com/huggingface/transformers", "https://github.com/pytorch/pytorch"
OURS = "locks: versions that were tested together"
CUDA_EXTRA = "pip install 'dgx-sparkctl[cuda]'"
LOCKED_TORCH = "torch==2.11.*"  # as in locks/gpu.txt
CUDA_TORCH = f"pip install --force-reinstall '{LOCKED_TORCH}' --index-url https://download.pytorch.org/whl/cu130"
HOPPER, BLACKWELL = (9,), (10, 12)
NGC = re.compile(r"\d+\.\d+\.\d+a0\+")  # how NVIDIA's images number their torch
NVIDIAS = ("torch", "triton")  # that such an image builds itself: never to be replaced in it


@dataclass(frozen=True)
class Facts:
    """What rules look at. capability: (12, 1), None without a GPU. requirements: of each library, from its metadata.

    target and assembler: the GPU's, and the ptxas that Triton would call for it. cuda_build: torch was built for CUDA.
    """

    versions: Mapping[str, str]
    capability: tuple[int, int] | None = None
    requirements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    driver: tuple[int, int] | None = None
    torch: Torch | None = None
    cuda_build: bool | None = None
    target: Target | None = None
    assembler: Assembler | None = None
    others: Sequence[Assembler] = ()

    def mend(self, library: str, command: str) -> str | None:
        """The command that installs another version of a library; None where it is the image's own."""
        return None if library in NVIDIAS and NGC.match(self.versions.get("torch", "")) else command

    def version(self, name: str) -> tuple[int, ...]:
        """Of a library, as numbers; () where it is not installed."""
        return numbers(self.versions.get(name, ""))

    @property
    def major(self) -> int:
        """Of the compute capability; 0 without a GPU."""
        return self.capability[0] if self.capability else 0


def numbers(version: str) -> tuple[int, ...]:
    """The release in a version: (2, 11, 0) of 2.11.0a0+1f3."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@dataclass(frozen=True)
class Rule:
    """judge: what is wrong, None where nothing is. mend: a command, or what makes one of the facts; None where there
    is none.
    """

    subject: str
    weight: Weight
    source: str
    judge: Callable[[Facts], str | None]
    mend: str | Callable[[Facts], str | None] | None

    def finding(self, facts: Facts) -> Finding | None:
        """What it finds."""
        what = self.judge(facts)
        mend = self.mend(facts) if callable(self.mend) else self.mend
        return Finding(self.subject, self.weight, what, mend, self.source) if what else None


def judge(facts: Facts) -> list[Finding]:
    """All that the rules find, and every requirement that is not met."""
    found = [finding for rule in RULES if (finding := rule.finding(facts))]
    return found + list(unmet(facts))


def missing(installed: Sequence[Installed], gpu: bool) -> Iterator[Finding]:
    """Libraries that training needs and that are not here, or cannot be imported."""
    own = NVIDIAS if any(one.library.name == "torch" and NGC.match(one.version or "") for one in installed) else ()
    for one in installed:
        needed = one.library.need == "always" or (one.library.need == "gpu" and gpu)
        if one.version is None and needed:
            yield Finding(
                one.library.name, Weight.NEEDED, f"{one.library.name} is not installed", _install(one.library)
            )
        elif one.version == UNREADABLE:
            what, mend = f"the metadata of {one.library.name} cannot be read", _again(one, one.library.name in own)
            yield Finding(one.library.name, Weight.NEEDED if needed else Weight.NOTE, what, mend)
        elif one.imports is False:
            what = f"{one.library.name} {one.version} cannot be imported: {one.problem}"
            yield Finding(
                one.library.name, Weight.NEEDED if needed else Weight.NOTE, what, _again(one, one.library.name in own)
            )


def _again(one: Installed, nvidias: bool) -> str | None:
    """Where an import does not end, installing it again does not help: which module it is in does.

    nvidias: it is the image's own build, which no registry has.
    """
    if "did not end" in (one.problem or ""):
        return f"`python -X importtime -c 'import {one.library.module}'`"
    pinned = one.library.name if one.version == UNREADABLE else f"{one.library.name}=={one.version}"
    return None if nvidias else f"pip install --force-reinstall --no-deps '{pinned}'"


def _install(library: Library) -> str:
    return CUDA_EXTRA if library.need == "gpu" else "pip install dgx-sparkctl"


def unmet(facts: Facts) -> Iterator[Finding]:
    """What a library asks of another that is here in another version: its own metadata's word."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return
    for name, lines in facts.requirements.items():
        for line in lines:
            try:
                asked = Requirement(line)
            except InvalidRequirement:
                continue
            here = facts.versions.get(canonicalize_name(asked.name))
            if here is None or (asked.marker and not asked.marker.evaluate({"extra": ""})):
                continue
            if not asked.specifier.contains(here, prereleases=True):
                wants = f"{asked.name}{asked.specifier}"
                what = f"{name} {facts.versions.get(name, '')} wants {wants}, and {here} is here"
                mend = facts.mend(canonicalize_name(asked.name), f"pip install '{wants}'")
                yield Finding(name, Weight.SLOW, what, mend, f"the metadata of {name}")


def _cpu_torch(facts: Facts) -> str | None:
    if facts.capability and facts.cuda_build is False:
        return f"torch {facts.versions.get('torch')} was built for CPUs, and a GPU is here"
    return None


def _architectures(facts: Facts) -> str | None:
    """A kernel runs on its own architecture and later minors of it; PTX on all later ones."""
    if not facts.capability or not facts.torch or not facts.torch.architectures:
        return None
    major, minor = facts.capability
    for name in facts.torch.architectures:
        kind, _, digits = name.partition("_")
        number = int(re.sub(r"\D", "", digits))
        same = number // 10 == major and number % 10 <= minor
        if (kind == "sm" and same) or (kind == "compute" and number <= 10 * major + minor):
            return None
    return (
        f"torch has kernels for {' '.join(facts.torch.architectures)}, and none for compute capability {major}.{minor}"
    )


def _old_driver(facts: Facts) -> str | None:
    built = numbers(facts.torch.cuda or "") if facts.torch else ()
    if built and facts.driver and facts.driver[0] < built[0]:
        runs = f"the driver runs CUDA {facts.driver[0]}.{facts.driver[1]}"
        return f"torch was built for CUDA {built[0]}, and {runs}; from 580 on it runs CUDA 13"
    return None


def _blind_torch(facts: Facts) -> str | None:
    if facts.capability and facts.torch and facts.torch.cuda and not facts.torch.available:
        return "torch was built for CUDA and finds no GPU, although NVML does"
    return None


def _ptxas(facts: Facts) -> str | None:
    if facts.target and facts.assembler and not facts.assembler.knows(facts.target):
        return f"{facts.assembler} stops at {facts.assembler.newest()}: Triton compiles nothing for {facts.target}"
    return None


def _cuda_torch(facts: Facts) -> str | None:
    return facts.mend("torch", CUDA_TORCH)


def _other_ptxas(facts: Facts) -> str | None:
    able = next((one for one in facts.others if facts.target and one.knows(facts.target)), None)
    variable = (
        "TRITON_PTXAS_BLACKWELL_PATH"
        if facts.target and facts.target.number >= BLACKWELL_PTXAS
        else "TRITON_PTXAS_PATH"
    )
    return f"`export {variable}={able.path}`" if able else facts.mend("triton", "pip install 'triton>=3.6'")


def _hopper(facts: Facts) -> str | None:
    triton = facts.version("triton")
    if facts.major in HOPPER and facts.version("flash-linear-attention") and (3, 4) <= triton < (3, 7, 1):
        return (
            f"flash-linear-attention's backward is wrong on Hopper with Triton {facts.versions['triton']} for key dims "
            "up to 64 (Qwen3.5's 128 is right), and its public function refuses to run; Triton 3.7.1 has it right"
        )
    return None


def _race(facts: Facts) -> str | None:
    fla, triton = facts.version("flash-linear-attention"), facts.version("triton")
    if facts.major in BLACKWELL and fla and fla < (0, 6) and triton < (3, 8):
        return (
            f"tl.dot races on Blackwell with Triton {facts.versions.get('triton')}, and flash-linear-attention "
            f"{facts.versions['flash-linear-attention']} does not avoid it: two runs differ"
        )
    return None


def _unsloth(facts: Facts) -> str | None:
    if facts.version("unsloth") and facts.capability and not facts.version("bitsandbytes"):
        return "unsloth does not start on a GPU without bitsandbytes"
    return None


def _old_image(facts: Facts) -> str | None:
    torch, triton = facts.versions.get("torch", ""), facts.version("triton")
    if NGC.match(torch) and numbers(torch) < (2, 11) and triton >= (3, 6):
        return f"NVIDIA's image with torch {torch} was made with an older Triton than {facts.versions['triton']}"
    return None


def _old_transformers(facts: Facts) -> str | None:
    version = facts.version("transformers")
    if version and version < (5, 17):
        return f"transformers {facts.versions['transformers']} is older than what was tested here, 5.17"
    return None


def _dropped_ends(facts: Facts) -> str | None:
    """Its plain torch takes cu_seqlens among **kwargs and never looks at them, in 5.12, 5.17 and 5.19; 5.23 refuses."""
    version = facts.version("transformers")
    if version and version < (5, 23) and not facts.version("flash-linear-attention"):
        return (
            f"transformers {facts.versions['transformers']} drops the ends of packed documents in GatedDeltaNet where "
            "flash-linear-attention is not used (no engine here packs through it; a script of your own would)"
        )
    return None


def _kernels_for_it(facts: Facts) -> str | None:
    return CUDA_EXTRA if facts.capability else None


def _fla_without_gpu(facts: Facts) -> str | None:
    if not facts.capability and facts.version("flash-linear-attention"):
        return "with flash-linear-attention and no GPU, transformers' own Qwen3.5 fails (sparkctl goes around it)"
    return None


def _interpreter(facts: Facts) -> str | None:
    if (3, 6) <= facts.version("triton") < (3, 7) and facts.version("numpy") >= (2, 4):
        return "Triton 3.6's interpreter fails with numpy 2.4 and newer: no kernel can be debugged in it"
    return None


INSTALLING = "https://pytorch.org/get-started/locally"
CUDA_COMPATIBILITY = "https://docs.nvidia.com/deploy/cuda-compatibility"
RULES = (
    Rule("torch", Weight.NEEDED, INSTALLING, _cpu_torch, _cuda_torch),
    Rule("torch", Weight.NEEDED, INSTALLING, _architectures, _cuda_torch),
    Rule("driver", Weight.NEEDED, CUDA_COMPATIBILITY, _old_driver, None),
    Rule(
        "torch", Weight.NEEDED, INSTALLING, _blind_torch, "`python -c 'import torch; torch.zeros(1).cuda()'` says why"
    ),
    Rule("triton", Weight.NEEDED, f"{TRITON}/issues/10331", _ptxas, _other_ptxas),
    Rule(
        "flash-linear-attention",
        Weight.NOTE,
        f"{FLA}/issues/640",
        _hopper,
        None,
    ),
    Rule(
        "flash-linear-attention",
        Weight.NEEDED,
        f"{TRITON}/issues/10590",
        _race,
        "pip install 'flash-linear-attention>=0.6'",
    ),
    Rule("triton", Weight.NEEDED, f"{PYTORCH}/issues/127271", _old_image, None),
    Rule("unsloth", Weight.SLOW, "https://github.com/unslothai/unsloth", _unsloth, "pip install bitsandbytes"),
    Rule("transformers", Weight.SLOW, OURS, _old_transformers, "pip install 'transformers>=5.17'"),
    Rule("transformers", Weight.NOTE, f"{TRANSFORMERS}/issues/46851", _dropped_ends, _kernels_for_it),
    Rule("flash-linear-attention", Weight.NOTE, FLA, _fla_without_gpu, None),
    Rule("triton", Weight.NOTE, OURS, _interpreter, "pip install 'numpy<2.4'"),
)
