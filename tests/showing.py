"""What `sparkctl show` says of a run's steps."""

from __future__ import annotations

import json
from collections.abc import Callable

from sparkctl.manifest.store import Run

Say = Callable[..., str]


def states(say: Say, run: Run) -> dict[str, str]:
    steps = json.loads(say("show", run.root, "--json"))["steps"]
    return {name: step["status"] for name, step in steps.items()}


def hint(say: Say, run: Run, step: str) -> str:
    return json.loads(say("show", run.root, "--json"))["steps"][step]["hint"]
