"""`sparkctl train` as two ranks: one writes, both compute the same, and one that is left alone says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from two_ranks import two_ranks

from sparkctl.cli import app
from sparkctl.manifest.store import Run
from sparkctl.steps.train import train
from sparkctl.train.engines.device import planned_device
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.metrics import TIMING, read


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A training, not begun."""
    return ready.run(tmp_path / "run", llama_folder, count=24)


def lines(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read(run.root / "metrics.jsonl")]


def _trained(rank: int, root: str, folder: str) -> None:
    with open(f"{folder}/{rank}.out", "w") as sys.stdout, open(f"{folder}/{rank}.err", "w") as sys.stderr:
        assert app.run(["train", root, "--json"]) == 0


def test_under_torchrun_the_ranks_share_a_step_and_the_first_writes(
    run: Run, tmp_path: Path, llama_folder: Path
) -> None:
    alone = ready.run(tmp_path / "alone", llama_folder, count=24)
    train(alone.root)
    two_ranks(_trained, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.out").read_text().count('"ok": true') for rank in (0, 1)] == [1, 0]
    assert "turns are empty" not in (tmp_path / "0.err").read_text()
    assert Run.open(run.root).manifest.train.status == "done"
    got, wanted = lines(run), lines(alone)
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # the order of sums; observed 2e-6


def test_packs_that_do_not_go_round_are_told_of(tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, gradient_accumulation=3, max_steps=2)
    two_ranks(_trained, str(run.root), str(tmp_path))
    said = (tmp_path / "0.err").read_text()
    assert "3 packs a step for 2 processes: 1 of 4 turns are empty; packs of 48 tokens (`--pack-length`) would" in said
    assert "turns" not in (tmp_path / "1.err").read_text()


def _choosing(rank: int, root: str, folder: str) -> None:
    """A rank whose tuner finds what no other's does."""

    def pin(engine: ReferenceEngine, choices: dict[str, str]) -> None:
        Path(folder, f"{rank}.pinned").write_text(choices["tile"])

    ReferenceEngine.choices = lambda engine: {"tile": f"of rank {rank}"}  # type: ignore[method-assign]
    ReferenceEngine.pin = pin  # type: ignore[method-assign]
    _trained(rank, root, folder)


def test_every_rank_computes_by_the_choices_that_are_written_down(run: Run, tmp_path: Path) -> None:
    two_ranks(_choosing, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.pinned").read_text() for rank in (0, 1)] == ["of rank 0"] * 2
    assert Run.open(run.root).manifest.train.choices == {"tile": "of rank 0"}


def _leaving(rank: int, root: str, folder: str) -> None:
    """The second ends in its third micro-step without a word."""
    original, calls = ReferenceEngine.micro_step, [0]

    def micro_step(engine: ReferenceEngine, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            os._exit(0)
        return original(engine, *arguments)

    ReferenceEngine.micro_step = micro_step  # type: ignore[method-assign]
    with open(f"{folder}/{rank}.err", "w") as sys.stderr:
        Path(folder, f"{rank}.status").write_text(str(app.run(["train", root])))


def test_a_rank_that_is_left_alone_says_so(run: Run, tmp_path: Path) -> None:
    two_ranks(_leaving, str(run.root), str(tmp_path))
    assert (tmp_path / "0.status").read_text() == "1"
    said = (tmp_path / "0.err").read_text()
    assert "error: rank 0 lost another rank in the middle\nhint: that one's own words say what ended it\n" in said
    assert "Traceback" not in said
    assert Run.open(run.root).manifest.train.status == "failed"


def test_a_rank_computes_on_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert planned_device("cuda", "RUN") == torch.device("cuda", 1)
    assert planned_device("cpu", "RUN") == torch.device("cpu")


LINGERING = """
import sys, threading
from sparkctl.cli import app
threading.Thread(target=threading.Event().wait).start()  # as NCCL's wait for a rank that does not come
sys.argv = ["sparkctl", "show", "nowhere"]
app.main()
"""


def test_a_rank_that_failed_waits_for_nothing(tmp_path: Path) -> None:
    command, several = [sys.executable, "-c", LINGERING], {**os.environ, "WORLD_SIZE": "2"}
    ended = subprocess.run(command, cwd=tmp_path, env=several, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
