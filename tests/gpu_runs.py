"""Trainings on a GPU: the machine they are planned for, a model that can be merged, what they came to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file, save_file
from untimed import untimed

from sparkctl.manifest import schema
from sparkctl.manifest.store import Run

MACHINE = schema.Machine(name="test", device="cuda", memory=1 << 33, cores=1)


def outcome(run: Run) -> tuple[list[dict[str, Any]], bytes, dict[str, str]]:
    """Every loss and norm, the last checkpoint's bytes, and what the run is pinned to."""
    lines = untimed(run.root / "metrics.jsonl")
    table = Run.open(run.root).manifest.train
    assert table is not None
    last = run.root / "checkpoints" / str(table.last_checkpoint)
    return lines, (last / "trainable.safetensors").read_bytes(), table.choices


def with_head(model: Path, folder: Path) -> Path:
    """A copy that has the MTP head its config promises."""
    shutil.copytree(model, folder)
    text = json.loads((folder / "config.json").read_text())
    widths = dict(hidden="hidden_size", heads="num_attention_heads", kv_heads="num_key_value_heads")
    widths |= dict(head_dim="head_dim", ffn="intermediate_size")
    head = tiny.mtp_tensors(seed=1, **{name: text[field] for name, field in widths.items()})
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | head, weights, metadata={"format": "pt"})
    return folder
