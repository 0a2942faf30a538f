"""What a training puts into memory: the numbers that the memory model and the throughput estimate are asked with."""

from __future__ import annotations

from dataclasses import dataclass

from sparkctl.manifest.table import EngineName, Mode

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Load:
    """What is trained, and on how much at once.

    trainable: parameters with gradients. rank: of the adapters, 0 in full fine-tuning. area: tokens computed at once,
    padding included. longest: the longest document. labels: label tokens among them. fla: GatedDeltaNet runs on
    flash-linear-attention. engine: what computes it. multiprocessors: of a GPU whose attention's backward splits its
    sums among them, see `splitting`. chunks: of the delta rule, of which each document begins its own; at least as many
    as one document has.
    """

    mode: Mode
    trainable: int
    rank: int
    area: int
    longest: int
    labels: int
    checkpointing: bool
    device: str
    fla: bool = False
    engine: EngineName = "reference"
    multiprocessors: int = 0
    chunks: int = 0


# of the largest GPU of each kind
MULTIPROCESSORS = {
    "8.0": 108, "8.6": 84, "8.7": 16, "8.9": 142, "9.0": 132, "10.0": 148, "10.3": 160, "12.0": 188, "12.1": 48,
}  # fmt: skip
NARROW = {"8.6", "8.9", "12.0", "12.1"}  # too little shared memory for FlashAttention-2's backward at wide heads
WIDEST = 192  # of head dims that it takes there
HOPPER = "9.0"  # where this project's own kernel is faster than it at head dims above WIDEST


def splitting(capability: str | None, head_dim: int) -> int:
    """Multiprocessors among which torch's FlashAttention-2 splits a deterministic backward on such a GPU; 0 where this
    project's own kernel computes attention (at head dims of 256 a DGX Spark and Hopper), which splits nothing.
    """
    if head_dim > WIDEST and capability in {*NARROW, HOPPER}:
        return 0
    return MULTIPROCESSORS.get(capability or "", 0)
