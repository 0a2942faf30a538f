"""Served folders with something wrong in their MTP head, made to be noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.model.weights import INDEX, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

FC = "mtp.fc.weight"


def swapped(served: Path, out: Path) -> Path:
    """A copy whose head takes the hidden state for the embedding, and the embedding for the hidden state: mtp.fc's
    halves change places. Every tensor is there in its shape, so nothing but its guesses can tell.
    """

    def swap(tensors: dict[str, Tensor]) -> None:
        width = tensors[FC].shape[1] // 2
        tensors[FC] = tensors[FC].roll(width, dims=1).contiguous()

    return _copy(served, out, swap)


def without(served: Path, out: Path, name: str = FC) -> Path:
    """A copy that lacks one tensor, in the shard and in the index, as if a tool had dropped it."""

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return _copy(served, out, drop, name)


def _copy(served: Path, out: Path, change: Callable[[dict[str, Tensor]], None], name: str = FC) -> Path:
    """`served` in `out`, made anew, with the shard that holds `name` changed, and the index to match."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(served, out)
    checkpoint = Checkpoint(out)
    shard, before = checkpoint.file(name).path, set(checkpoint.file(name).names())
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    if checkpoint.sharded:
        index = json.loads((out / INDEX).read_bytes())
        for gone in before - set(tensors):
            del index["weight_map"][gone]
            index["metadata"]["total_size"] -= checkpoint.nbytes(gone)
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return out
