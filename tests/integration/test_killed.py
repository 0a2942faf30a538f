"""Killed with SIGKILL and resumed, a training ends as the one left alone: the same losses, byte-equal weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MOMENTS, FEW = 20, 4
SEED = 11


def killed(folder: Path, model: Path, moments: int, *options: str) -> dict[str, Any]:
    """What `killing.py` reports."""
    script = Path(__file__).with_name("killing.py")
    paths = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), str(model), str(moments), str(SEED), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_in_full_mode_on_the_native_engine(llama_folder: Path, tmp_path: Path) -> None:
    moments = killed(tmp_path, llama_folder, FEW, "full", "native")["moments"]
    assert len(moments) == FEW
    assert {m["killed"] for m in moments} == {-signal.SIGKILL}
    assert {m["call"] for m in moments} >= {"NativeEngine.micro_step", "ShardWriter.write", "os.replace"}
    assert [m for m in moments if m["resumed"] != 0 or m["different"]] == []


def test_killed_at_twenty_moments_and_resumed(llama_folder: Path, tmp_path: Path) -> None:
    report = killed(tmp_path, llama_folder, MOMENTS)
    moments = report["moments"]
    assert len(moments) == MOMENTS
    assert report["steps"] >= 5
    assert {m["killed"] for m in moments} == {-signal.SIGKILL}
    kinds = {m["call"] for m in moments}
    assert kinds >= {"os.replace", "os.fsync", "os.write", "ShardWriter.write", "ReferenceEngine.micro_step"}
    assert [m for m in moments if m["resumed"] != 0 or m["different"]] == []
    amid = [m for m in moments if m["left"] == "running"]  # not before it had begun, nor after its last write
    assert len(amid) >= MOMENTS // 2
    assert all("killed" in m["resumes"] for m in amid)
    assert sum(m["twice"] == -signal.SIGKILL for m in moments) >= 3
