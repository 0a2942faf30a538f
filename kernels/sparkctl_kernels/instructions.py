"""The instructions of a compiled kernel that decide how fast it is, counted in its PTX."""

from __future__ import annotations

import re

# name for a person: how it begins in PTX. Once a loop's body, however often that runs.
KINDS = {
    "mma.sync": r"mma\.sync\.",
    "wgmma": r"wgmma\.mma_async\.",
    "tcgen05.mma": r"tcgen05\.mma\.",
    "cp.async": r"cp\.async\.c[ag]\.",
    "cp.async.bulk": r"cp\.async\.bulk\.(?!commit|wait)",
    "ldmatrix": r"ldmatrix\.",
    "fma": r"fma\.rn\.",
    "atomic": r"(?:atom|red)\.",
}
TENSOR_CORES = ("mma.sync", "wgmma", "tcgen05.mma")
_STARTS = {name: re.compile(rf"^\s*(?:@!?%p\d+ )?{start}", re.MULTILINE) for name, start in KINDS.items()}


def counted(ptx: str) -> dict[str, int]:
    """How many there are of each kind; kinds that are not there are left out."""
    found = {name: len(start.findall(ptx)) for name, start in _STARTS.items()}
    return {name: count for name, count in found.items() if count}


def on_tensor_cores(found: dict[str, int]) -> bool:
    """Whether products run there, rather than on fma."""
    return any(found.get(name) for name in TENSOR_CORES)
