"""Killed with SIGKILL and resumed, a training ends as the one left alone: the same losses, byte-equal weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

MOMENTS = 20
SEED = 11


def test_killed_at_twenty_moments_and_resumed(llama_folder: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killing.py")
    paths = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), str(llama_folder), str(MOMENTS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
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
