"""Another process that is in the middle of a step of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = """
import sys, time; from pathlib import Path; from sparkctl.manifest.store import Run
with Run.open(Path(sys.argv[1])).step('train'):
    print('held', flush=True); time.sleep(60)
"""


@contextmanager
def training(run: Path) -> Iterator[subprocess.Popen[str]]:
    """It holds `train` of the run; killed at the end of the block, where it still lives."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
