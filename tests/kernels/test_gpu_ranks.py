"""On two GPUs: what two ranks train together by NCCL is what one trains alone, and what one's end does to the other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import faulty_rank
import pytest
import ready
import torch
from gpu_runs import MACHINE, outcome, with_head
from two_ranks import free_port
from untimed import untimed

from sparkctl import child
from sparkctl.child import Ended
from sparkctl.cli import app
from sparkctl.manifest.store import Run
from sparkctl.steps.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(600),
]

LIMIT = 150  # seconds; torchrun waits 30 for a rank that is told to end
BF16 = (
    2e-2  # of a loss or a norm: packs are added up in another order, and AdamW turns small gradients into whole steps
)


@pytest.fixture
def made(tmp_path: Path, wide_qwen35: Path) -> Any:
    """Runs on one model: `made(name)`."""
    model = with_head(wide_qwen35, tmp_path / "model")

    def make(name: str, mode: str = "lora") -> Run:
        changes = dict(learning_rate=1e-3, gradient_accumulation=4, max_steps=6)
        return ready.run(tmp_path / name, model, count=48, engine="native", mode=mode, machine=MACHINE, **changes)

    return make


def together(run: Run, *words: str) -> Ended:
    """`python WORDS RUN` on both GPUs; what still runs after `LIMIT` is killed, and that is its problem."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), *words, str(run.root)]
    return child.run(command, seconds=LIMIT)


def sparkctl(run: Run, *command: str) -> None:
    """The command in both ranks, as a user gives it to torchrun."""
    done = together(run, "-m", "sparkctl", *command)
    assert done.problem is None, done.err[-4000:]


def faulty(run: Run, fault: str) -> str:
    """What a training says in whose second rank the fault strikes."""
    done = together(run, faulty_rank.__file__, fault, "train")
    assert done.problem is not None
    assert "ChildFailedError" in done.err, done  # torchrun's word: it saw the rank end
    return done.out + done.err


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_ranks_train_as_one(made: Any, mode: str) -> None:
    alone, two = made("alone", mode), made("two", mode)
    train(alone.root)
    sparkctl(two, "train")
    as_one(outcome(two)[0], outcome(alone)[0])


def test_two_ranks_train_a_head_as_one(made: Any, tmp_path: Path) -> None:
    alone = made("alone")
    train(alone.root)
    assert app.run(["merge", str(alone.root)]) == 0
    two = Run.open(shutil.copytree(alone.root, tmp_path / "two"))
    command = ("mtp", "train", "--prompts", "2", "--pack-length", "64", "--max-steps", "6")
    assert app.run([*command, str(alone.root)]) == 0
    sparkctl(two, *command)
    mine, theirs = (untimed(run.root / "mtp" / "metrics.jsonl") for run in (two, alone))
    as_one(mine, theirs)
    tables = [Run.open(run.root).manifest.mtp for run in (two, alone)]
    assert [table.train.processes for table in tables if table and table.train] == [2, 1]


def as_one(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Several ranks' losses and norms beside those of one process."""
    assert len(mine) == len(theirs) > 6
    for line, wanted in zip(mine, theirs, strict=True):
        assert line == pytest.approx(wanted, rel=BF16)


@pytest.mark.parametrize("fault", ["lose", "stop", "fill"])
def test_what_one_rank_suffers_both_end_of_and_the_resumed_training_is_the_one_left_alone(
    made: Any, fault: str
) -> None:
    straight, run = made("straight"), made("run")
    sparkctl(straight, "train")
    said = faulty(run, fault)
    table = Run.open(run.root).manifest.train
    assert table is not None
    assert table.status != "done"
    if fault == "stop":
        assert "saved" in said
        assert table.step > 3
    sparkctl(run, "resume")
    assert outcome(run) == outcome(straight)


def test_a_number_that_is_none_on_one_rank_ends_both(made: Any) -> None:
    said = faulty(made("run"), "poison")
    assert "is nan" in said
    assert "documents" in said
