"""A training whose driver ends: what was done stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import ready

from sparkctl.cli import app
from sparkctl.errors import SparkError
from sparkctl.hardware import machine, measurements
from sparkctl.manifest.store import Run


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A training of four steps of three packs, a checkpoint after the third step."""
    return ready.run(tmp_path / "run", llama_folder, count=24)


def test_a_driver_that_ends_meanwhile_costs_the_rate_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise SparkError("the GPU cannot be asked: NVML: driver/library version mismatch", "sparkctl doctor")

    monkeypatch.setattr(measurements, "ENOUGH", 1)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(machine, "find_gpu", gone)
    assert app.run(["train", str(run.root)]) == 0
    assert Run.open(run.root).manifest.train.status == "done"
