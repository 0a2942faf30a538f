"""MTP heads for tests: files of their own, and models that hold theirs in other ways than `tiny.qwen35` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import merging
import tiny
import torch
from safetensors.torch import save_file

from sparkctl.files import sha256_file
from sparkctl.manifest import schema
from sparkctl.manifest.evidence import Acceptance
from sparkctl.manifest.store import Run
from sparkctl.model import mtp
from sparkctl.model.weights import INDEX, SINGLE, ShardWriter
from sparkctl.mtp.source import HeadSource
from sparkctl.steps.mtp_eval import TRAINED

SIZES: dict[str, int] = dict(hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64)  # of the tiny models
WANTED = {name: tuple(tensor.shape) for name, tensor in tiny.mtp_tensors(**SIZES, seed=0).items()}


def head_file(path: Path, seed: int = 5, **changes: int) -> Path:
    """What a training of the head leaves: mtp/head.safetensors in a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny.mtp_tensors(**(SIZES | changes), seed=seed), path)
    return path


def values(head: HeadSource) -> dict[str, torch.Tensor]:
    """The tensors of a head."""
    return {name: file.read(name) for name, file in head.tensors.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether names and bits are the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def own(folder: Path) -> dict[str, torch.Tensor]:
    """The head's tensors in a model's folder."""
    return {name: tensor for name, tensor in merging.tensors(folder).items() if name.startswith(mtp.PREFIX)}


def rebuilt(model: Path, out: Path, files: int) -> Path:
    """`model` in so many files, head and body mixed in each; one file has no index."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = merging.tensors(model)
    ordered = sorted(tensors, key=lambda name: hash_of(name))
    names = [SINGLE] if files == 1 else [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    places = {name: names[number % files] for number, name in enumerate(ordered)}
    for shard in names:
        layout = {n: (tensors[n].dtype, tensors[n].shape) for n in ordered if places[n] == shard}
        with ShardWriter(out / shard, layout, {"format": "pt"}) as writer:
            for name in layout:
                writer.write(name, tensors[name])
    if files > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return out


def hash_of(name: str) -> int:
    """A fixed disorder."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(reversed(name))) % 1009


def configured(folder: Path, **changes: Any) -> Path:
    """`folder` with other values in the language model's part of its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config).update(changes)
    path.write_text(json.dumps(config, indent=1))
    return folder


def trained_head(run: Run, *, seed: int = 5, rates: tuple[float, ...] = (), name: str = TRAINED) -> Path:
    """What `mtp train` leaves in a run. rates: accepted at 1, 2, … of all drafts, where that was measured."""
    path = head_file(run.root / "mtp" / "head.safetensors", seed)
    row = Acceptance(
        name=name, prompts=1, tokens=9, drafts=9, conditional=list(rates), cumulative=list(rates),
        mean_accepted=sum(rates), shorter=[list(rates[:n]) for n in range(1, len(rates))], made_from="test",
    )  # fmt: skip
    with run.edit() as manifest:
        manifest.mtp = schema.MtpTable(
            mode="trained",
            head="mtp/head.safetensors",
            digest=sha256_file(path),
            acceptance=[row] if rates else [],
            made_from="test",
        )
    return path
