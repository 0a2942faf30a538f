"""The demo, once, through the installed command: it keeps its promises, in time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 120  # seconds on two cores


def test_demo_keeps_its_promises(tmp_path: Path) -> None:
    command = shutil.which("sparkctl", path=str(Path(sys.executable).parent))
    assert command
    started = time.monotonic()
    done = subprocess.run([command, "demo", str(tmp_path / "demo"), "--json"], capture_output=True, text=True)
    elapsed = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["problems"] == []
    assert said["questions"] >= 30
    assert said["exact_before"] == 0
    assert said["exact_after"] >= 0.95 * said["questions"]
    assert said["final_loss"] < 0.2
    assert 0 < said["resumed_from"] < said["killed_at"] < said["steps"]
    assert elapsed <= LIMIT, said["seconds"]
    assert "Traceback" not in done.stderr
    assert "Loading weights" not in done.stderr
    show = [command, "show", str(tmp_path / "demo" / "run"), "--get", "resumes"]
    assert subprocess.run(show, capture_output=True, env=os.environ).returncode == 0
    assert (tmp_path / "demo" / "run" / "merged" / "model.safetensors.index.json").exists()
