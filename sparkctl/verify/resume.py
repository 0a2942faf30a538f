"""Two trainings that should be one and the same: what differs between them, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sparkctl.train import state
from sparkctl.train.metrics import TIMING, read
from sparkctl.verify.bits import apart

SHOWN = 3  # differences of a kind


def differences(straight: Path, resumed: Path, steps: int) -> list[str]:
    """Metrics up to optimiser step `steps`, and the checkpoint of that step, of two runs; empty where all is equal."""
    name = state.checkpoint_id(steps)
    checkpoints = [run / "checkpoints" / name for run in (straight, resumed)]
    lost = [f"`{name}` is missing" for checkpoint in checkpoints if not checkpoint.is_dir()]
    if lost:
        return lost
    found = list(_metrics(*(run / "metrics.jsonl" for run in (straight, resumed))))
    for file in (state.TRAINABLE, state.OPTIMIZER):
        straight_file, resumed_file = (checkpoint / file for checkpoint in checkpoints)
        if straight_file.read_bytes() != resumed_file.read_bytes():
            found += list(_tensors(straight_file, resumed_file))[:SHOWN] or [f"{file}: other bytes around its tensors"]
    return found


def _metrics(straight: Path, resumed: Path) -> Iterator[str]:
    """Lines apart from what takes time; a run of them differs once one does, so the first few tell enough."""
    nothing: dict[str, Any] = {}
    pairs = zip_longest(read(straight), read(resumed), fillvalue=nothing)
    unequal = [
        f"{straight.name}: step {a.get('step', b.get('step'))}: {key} {a.get(key)} straight, {b.get(key)} resumed"
        for a, b in pairs
        for key in dict.fromkeys([*a, *b])
        if key not in TIMING and a.get(key) != b.get(key)
    ]
    yield from unequal[:SHOWN]


def _tensors(straight: Path, resumed: Path) -> Iterator[str]:
    """Tensors whose bytes differ, and by how much."""
    from safetensors import safe_open

    with safe_open(straight, framework="pt") as a, safe_open(resumed, framework="pt") as b:
        names = list(a.keys())
        if names != list(b.keys()):
            yield f"{straight.name}: other tensors"
            return
        for name in names:
            x, y = a.get_tensor(name), b.get_tensor(name)
            if far := apart(x, y):
                yield f"{straight.name}: `{name}` differs by {far:.1e} of its norm"
