"""The native engine on two ranks beside one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ranked
import ready
from two_ranks import free_port

from sparkctl.train import state
from sparkctl.train.ranks import Ranks

SCRIPT = Path(ranked.__file__)
LIMIT = 2e-6  # relative; observed 2e-7
FAR = 2e-6  # of a parameter after six steps of 1e-3; observed 1.2e-7


def torchrun(*arguments: str) -> None:
    """Run the script on two ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_ranks_train_as_one_process(qwen35_folder: Path, tmp_path: Path, mode: str) -> None:
    ready.store(tmp_path / "two" / "tokens", ready.documents(40))  # before either rank looks for it
    torchrun(str(qwen35_folder), str(tmp_path / "two"), mode)
    alone = ranked.training(qwen35_folder, tmp_path / "alone", mode, Ranks())
    alone.run()
    two = ranked.training(qwen35_folder, tmp_path / "two", mode, Ranks())
    for key in ("loss", "eval_loss", "grad_norm"):
        assert two.lines(key) == pytest.approx(alone.lines(key), rel=LIMIT), key
    assert two.lines("tokens") == alone.lines("tokens")
    end = state.load(tmp_path / "two" / "checkpoints" / "step-000006", two.optimizer)
    assert (end.tokens, end.epoch) == (alone.state.tokens, alone.state.epoch)
    apart = max(
        float((parameter.detach() - alone.engine.parameters()[name]).abs().max())
        for name, parameter in two.engine.parameters().items()
    )
    assert apart < FAR
