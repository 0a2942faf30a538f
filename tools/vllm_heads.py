"""Served folders made anew: with something wrong in their MTP head, to be noticed, or without tied embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.model.weights import INDEX, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

FC, HEAD_NORM = "mtp.fc.weight", "mtp.norm.weight"
EMBEDDING, NORM = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"
LM_HEAD = "lm_head.weight"
CONFIG, TIED = "config.json", "tie_word_embeddings"


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


def untied(served: Path, out: Path, seed: int = 0) -> Path:
    """A copy with an lm_head of its own that computes the same: a fixed half of the coordinates of the final states
    changes its sign, and what reads the states, lm_head and mtp.fc, takes it back.

    In exact arithmetic, that is: RMSNorm's factor 1 + w is rounded anew where its sign changes. Without it the final
    states point along the embedding of the next token, which lm_head is; with it they are as far from it as from any.
    """
    import torch

    out = _anew(served, out)
    width = Checkpoint(out).shape(EMBEDDING)[1]
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0

    def part(tensors: dict[str, Tensor]) -> None:
        for name in (NORM, HEAD_NORM):
            if name in tensors:
                tensors[name] = (signs * (1 + tensors[name].float()) - 1).to(tensors[name].dtype)
        if EMBEDDING in tensors:
            tensors[LM_HEAD] = (tensors[EMBEDDING] * signs).to(tensors[EMBEDDING].dtype)
        if FC in tensors:
            embedded, state = tensors[FC].chunk(2, dim=1)
            tensors[FC] = torch.cat([embedded, state * signs.to(state.dtype)], dim=1)

    for path in Checkpoint(out).shards():
        _change(out, path, part)
    config = json.loads((out / CONFIG).read_bytes())
    config[TIED] = config["text_config"][TIED] = False
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return out


def _copy(served: Path, out: Path, change: Callable[[dict[str, Tensor]], None], name: str = FC) -> Path:
    """`served` in `out`, made anew, with the shard that holds `name` changed."""
    out = _anew(served, out)
    _change(out, Checkpoint(out).file(name).path, change)
    return out


def _anew(served: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(served, out))


def _change(folder: Path, shard: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The shard's tensors as `change` leaves them, and the index to match."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    before = {name: tensor.nbytes for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_bytes())
        for name in before.keys() - tensors.keys():
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values()) - sum(before.values())
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
