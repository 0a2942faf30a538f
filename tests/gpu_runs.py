"""Trainings on a GPU: the machine they are planned for, a model that can be merged, what they came to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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


def without_head(model: Path, folder: Path) -> Path:
    """A copy whose config promises no MTP head: what is trained on it can be merged."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 0}))
    return folder
