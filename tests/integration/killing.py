"""Trainings killed with SIGKILL at chosen moments and resumed, in forks of one process that has everything imported.

Run by test_killed.py: `python killing.py FOLDER MODEL MOMENTS SEED [MODE ENGINE]` prints a JSON report. A moment is a
call, counted over the whole training, of something that computes, writes, syncs, renames or removes; the kill comes
before it, after it, or (where bytes are written) in the middle of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ready
import torch
from forking import mend_threads
from untimed import untimed

from sparkctl.manifest.store import Run
from sparkctl.model.weights import ShardWriter
from sparkctl.steps.resume import resume
from sparkctl.steps.train import train
from sparkctl.train.engines.native.engine import NativeEngine
from sparkctl.train.engines.reference import ReferenceEngine

WATCHED: list[tuple[Any, str]] = [
    (os, "replace"), (os, "fsync"), (os, "write"), (shutil, "rmtree"), (ShardWriter, "write"),
    (ReferenceEngine, "micro_step"), (NativeEngine, "micro_step"),
]  # fmt: skip
WHEN = ("before", "amid", "after")


class Watch:
    """Counts the calls; at call `at` it kills this process."""

    def __init__(self, at: int | None, when: str) -> None:
        self.at, self.when, self.calls = at, when, []
        for owner, name in WATCHED:
            setattr(owner, name, self._wrapped(f"{owner.__name__}.{name}", getattr(owner, name)))

    def _wrapped(self, label: str, function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(label)
            now = len(self.calls) - 1 == self.at
            if now and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if now and self.when == "amid" and label == "os.write":
                function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def forked(work: Callable[[], object]) -> int:
    """The exit status of `work` in a fork; minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mend_threads()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(root: Path) -> dict[str, Any]:
    """What has to be equal in the end: losses, weights, moments, and no leftover."""
    lines = untimed(root / "metrics.jsonl")
    trained = Run.open(root).manifest.train
    assert trained
    last = root / "checkpoints" / str(trained.last_checkpoint)
    return {
        "lines": lines,
        "weights": (last / "trainable.safetensors").read_bytes().hex(),
        "moments": (last / "optimizer.safetensors").read_bytes().hex(),
        "best": [trained.status, trained.best_checkpoint, trained.best_eval_loss, trained.final_loss, trained.tokens],
        "files": sorted(p.name for p in (root / "checkpoints").iterdir()),
    }


def moments(calls: list[str], count: int, seed: int) -> list[tuple[int, str]]:
    """Seeded moments; every kind of call is among them."""
    chosen = random.Random(seed)
    kinds = sorted(set(calls))
    picked = [chosen.choice([i for i, call in enumerate(calls) if call == kind]) for kind in kinds]
    while len(picked) < count:
        picked.append(chosen.randrange(len(calls)))
    return [(at, WHEN[i % len(WHEN)]) for i, at in enumerate(picked[:count])]


def killed(work: Callable[[Path], object], root: Path, at: int, when: str) -> None:
    """A training, or the resumption of one, that does not live to its end."""
    Watch(at, when)
    work(root)


def main(
    folder: Path, model: Path, count: int, seed: int, mode: str = "lora", engine: str = "reference"
) -> dict[str, Any]:
    torch.set_num_threads(1)
    prepared = ready.run(folder / "ready", model, count=32, save_every=2, keep=1, mode=mode, engine=engine).root

    def copy(name: str) -> Path:
        return Path(shutil.copytree(prepared, folder / name))

    train(copy("warm"))  # here, so that the forks inherit every import and every kernel
    straight = copy("straight")

    def watched() -> None:
        watch = Watch(None, "")
        train(straight)
        (folder / "calls.json").write_text(json.dumps(watch.calls))

    assert forked(watched) == 0
    wanted = outcome(straight)
    calls = json.loads((folder / "calls.json").read_text())
    report = []
    for n, (at, when) in enumerate(moments(calls, count, seed)):
        root = copy(f"killed{n}")
        status = forked(partial(killed, train, root, at, when))
        left = Run.open(root).manifest.train
        began = left is not None
        again = began and n % 3 == 0  # the resumption is killed too, where it lives that long
        twice = forked(partial(killed, resume, root, at // 2, when)) if again else None
        resumed = forked(partial(resume if began else train, root))
        got = outcome(root) if resumed == 0 else {}
        different = [key for key in wanted if got.get(key) != wanted[key]]
        entries = [entry.reason for entry in Run.open(root).manifest.resumes]
        report.append(
            {"at": at, "call": calls[at], "when": when, "killed": status, "twice": twice,
             "left": left.status if left else None,
             "resumed": resumed, "different": different, "resumes": entries}
        )  # fmt: skip
    return {"calls": len(calls), "steps": len([line for line in wanted["lines"] if "loss" in line]), "moments": report}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])))
