"""What devices can do at best, where that is known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at best. bytes: of memory a second; operations: dense bf16 a second; memory: bytes, a
    Spark's host included. capability: of its GPU.
    """

    name: str
    bytes: float
    operations: float
    share: float  # of the operations that large matrix products reach in practice
    memory: int
    capability: str


DEVICES = {
    "gb10": Ceiling("NVIDIA GB10 (DGX Spark)", 273e9, 100e12, 0.9, 128 * 10**9, "12.1"),
    "h100": Ceiling("NVIDIA H100 SXM", 3.35e12, 780e12, 1.0, 80 << 30, "9.0"),
    "h200": Ceiling("NVIDIA H200", 4.2e12, 790e12, 1.0, 140 << 30, "9.0"),  # measured: a copy, a product of 8192³
}
