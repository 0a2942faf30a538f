"""Which kernel an operator runs on, with a reason that can be printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Choice:
    """`slow` marks a fallback that a GPU run refuses; `mend` is the command that makes it fast."""

    operator: str
    kernel: str
    reason: str
    slow: bool = False
    mend: str | None = None


_interpreting = False


def fused(tensor: torch.Tensor) -> bool:
    """True where the Triton kernels take this tensor: on a GPU; in tests under Triton's interpreter too."""
    return tensor.is_cuda or _interpreting


@contextmanager
def interpreted() -> Iterator[None]:
    """Send CPU tensors through the Triton kernels in this block: for tests, in a process with TRITON_INTERPRET=1."""
    global _interpreting
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False


def triton_or_reference(operator: str, device: torch.device) -> Choice:
    """The choice of operators that have a Triton kernel for every GPU and a reference for the rest."""
    if device.type == "cuda":
        return Choice(operator, "triton", "fused kernel of this project")
    return Choice(operator, "reference", f"plain torch on {device.type}")


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's functions add in a fixed order in this block, those that have such a kernel.

    Not everywhere: cuBLAS, which has one order on one stream, would then want CUBLAS_WORKSPACE_CONFIG, and torch reads
    and parses that variable at each product: 80 µs of host time instead of 25 (torch 2.11), 24 ms a step of a 2B.
    New tensors are not filled with NaN, which torch would do for the order's sake too.
    """
    filling: Any = torch.utils.deterministic  # an untyped module
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]
