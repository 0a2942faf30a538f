"""What metrics.jsonl says of a training, without what a clock or a meter says: equal where trainings are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkctl.train.metrics import TIMING, read


def untimed(path: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read(path)]
