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
    flash-linear-attention. engine: what computes it.
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
