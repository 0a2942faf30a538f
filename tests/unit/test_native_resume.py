"""A training on the native engine that is interrupted and resumed is the one left alone, to the bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ready
from striking import at_step
from untimed import untimed

from sparkctl.errors import Interrupted
from sparkctl.manifest.store import Run
from sparkctl.steps.resume import resume
from sparkctl.steps.train import train
from sparkctl.train.engines.native.engine import NativeEngine


class Said:
    """Keeps what a training says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Any:
        from sparkctl.progress import silent

        return getattr(silent, name)


def outcome(run: Run) -> tuple[list[dict[str, Any]], bytes]:
    """Every loss and norm, and the last checkpoint's bytes."""
    lines = untimed(run.root / "metrics.jsonl")
    last = Run.open(run.root).manifest.train.last_checkpoint
    return lines, (run.root / "checkpoints" / last / "trainable.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_interrupted_then_resumed_is_as_uninterrupted(
    tmp_path: Path, qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    straight, run = (
        ready.run(tmp_path / name, qwen35_folder, count=24, engine="native", mode=mode) for name in ("a", "b")
    )
    train(straight.root)
    losses = [line["loss"] for line in outcome(straight)[0] if "loss" in line]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        at_step(patch, NativeEngine, 7, lambda engine: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(run.root)
    stopped = Run.open(run.root).manifest.train
    assert 0 < stopped.step < 4
    said = Said()
    resume(run.root, progress=said)
    assert any("gated_delta: reference (plain torch on cpu)" in line for line in said.lines)
    assert not any("not bit for bit" in line for line in said.lines)
    assert outcome(run) == outcome(straight)
    assert Run.open(run.root).manifest.train.engine == "native"
