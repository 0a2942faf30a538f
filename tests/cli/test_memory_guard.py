"""Memory that runs out under `sparkctl train`: it saves, says so and goes on later, before the kernel kills it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import merging_run
import pytest
import ready

from sparkctl.cli import app
from sparkctl.manifest.schema import Machine
from sparkctl.manifest.store import Run
from sparkctl.model import load
from sparkctl.mtp import drafter
from sparkctl.steps.train import train
from sparkctl.train import watch
from sparkctl.train.engines.reference import ReferenceEngine

GIB = 1 << 30
BEGUN = 9  # the micro-step of step 3 in which memory goes: the first is the rehearsal's


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    """A finished training. Read only."""
    run = ready.run(tmp_path_factory.mktemp("straight") / "run", llama_folder, count=24)
    train(run.root)
    return Run.open(run.root)


def weights(run: Run) -> bytes:
    trained = Run.open(run.root).manifest.train
    assert trained
    return (run.root / "checkpoints" / str(trained.last_checkpoint) / "trainable.safetensors").read_bytes()


def at_micro_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something in the micro-step of that number."""
    original, calls = ReferenceEngine.micro_step, itertools.count(1)

    def micro_step(self: ReferenceEngine, pack: Any, scale: float) -> Any:
        if next(calls) == number:
            act()
        return original(self, pack, scale)

    patch.setattr(ReferenceEngine, "micro_step", micro_step)


def test_it_saves_stops_with_the_reason_and_resumes_bit_for_bit(
    tmp_path: Path,
    llama_folder: Path,
    straight: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(name="a processor", device="cpu", memory=112 * GIB, cores=20)
    run = ready.run(tmp_path / "run", llama_folder, count=24, machine=machine)
    left, looks = [9 * GIB], [0]

    def read() -> int:
        looks[0] += 1
        return left[0]

    def take() -> None:
        left[0] = 2 * GIB
        looked, end = looks[0], time.monotonic() + 10
        while looks[0] < looked + 2 and time.monotonic() < end:
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(watch, "available_memory", read)
        patch.setattr(watch, "EVERY", 0.01)
        at_micro_step(patch, BEGUN, take)
        status = app.run(["train", str(run.root), "--json"])
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert (status, answer["exit_status"]) == (1, 1)
    assert "memory ran low (2.00 GiB left, the floor is 2.24 GiB)" in answer["error"]
    assert f"`sparkctl resume {run.root}`" in answer["hint"]
    assert "memory runs low" in said.err
    stopped = Run.open(run.root).manifest.train
    assert stopped
    assert (stopped.status, stopped.stopped) == ("interrupted", "memory ran low (2.00 GiB left, the floor is 2.24 GiB)")
    assert 0 < stopped.step < 4
    assert app.run(["show", str(run.root)]) == 0
    assert "memory ran low" in " ".join(capsys.readouterr().out.split())
    assert app.run(["resume", str(run.root)]) == 0
    manifest = Run.open(run.root).manifest
    assert [(resumed.step, resumed.reason) for resumed in manifest.resumes] == [(stopped.step, stopped.stopped)]
    assert manifest.train
    assert (manifest.train.status, manifest.train.stopped) == ("done", None)
    assert weights(run) == weights(straight)


def test_stopped_at_once_it_is_interrupted_not_failed(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, machine=LARGE)
    left = [9 * GIB]

    def take() -> None:
        left[0] = GIB
        with suppress(Exception):  # a library's
            time.sleep(10)
        pytest.fail("it went on")

    monkeypatch.setattr(watch, "available_memory", lambda: left[0])
    monkeypatch.setattr(watch, "EVERY", 0.01)
    at_micro_step(monkeypatch, BEGUN, take)
    assert app.run(["train", str(run.root)]) == 1
    assert f"stopped at once, without saving; {SHORT.replace('2.00', '1.00')}" in capsys.readouterr().err
    stopped = Run.open(run.root).manifest.train
    assert stopped
    assert (stopped.status, stopped.stopped) == ("interrupted", SHORT.replace("2.00", "1.00"))


SHORT = "memory ran low (2.00 GiB left, the floor is 2.24 GiB)"


def short_while_loading(patch: pytest.MonkeyPatch) -> None:
    """Less than the floor is left from the moment when a model is loaded; its loading takes long."""
    left = [9 * GIB]

    def load_text_model(*given: Any, **named: Any) -> Any:
        left[0] = 2 * GIB
        time.sleep(10)
        pytest.fail("it went on")

    patch.setattr(watch, "available_memory", lambda: left[0])
    patch.setattr(watch, "LOADING", 0.01)
    for module in (load, drafter):
        patch.setattr(module, "load_text_model", load_text_model)


LARGE = Machine(name="a processor", device="cpu", memory=112 * GIB, cores=20)


@pytest.fixture(params=["train", "resume", "mtp train"])
def ready_for(request: pytest.FixtureRequest, tmp_path: Path, llama_folder: Path, qwen35_folder: Path) -> list[str]:
    """A command that loads a model, and its run."""
    root, few = tmp_path / "run", []
    if request.param == "mtp train":
        run, few = merging_run.trained_run(root, qwen35_folder), ["--prompts", "3", "--pack-length", "64"]
        ready.store(root / "tokens", ready.documents(20))
        with run.edit() as manifest:
            assert manifest.plan
            manifest.plan.machine = LARGE
        assert app.run(["merge", str(root)]) == 0
    else:
        ready.run(root, llama_folder, count=24, machine=LARGE)
    if request.param == "resume":
        with pytest.MonkeyPatch.context() as patch:
            at_micro_step(patch, BEGUN, lambda: signal.raise_signal(signal.SIGINT))
            assert app.run(["train", str(root)]) == 130
    return [*request.param.split(), str(root), *few]


def test_a_model_that_is_too_large_is_not_loaded_to_its_end(
    ready_for: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "run" / "run.toml"
    before = manifest.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        short_while_loading(patch)
        status = app.run([*ready_for, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (status, answer["exit_status"]) == (1, 1)
    assert answer["error"] == f"interrupted while the model was loaded; nothing to save; {SHORT}"
    assert answer["hint"].startswith("free some memory (`ps")
    assert manifest.read_bytes() == before
    assert app.run(ready_for) == 0  # the same command again, as the hint says


# A process that enters a group with a limit, trains, and in one micro-step, or while the model is loaded (number 0),
# takes memory piece by piece until less than the floor is left (or nothing, where nobody watches), as another process
# on that machine would.
PROGRAM = """
import itertools, sys, time
root, procs, number, watched = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "watched"
with open(procs, "w") as file:
    file.write("0")
import numpy as np
from sparkctl.cli import app
from sparkctl.hardware.machine import available_memory
from sparkctl.manifest.store import Run
from sparkctl.model import load
from sparkctl.train import watch
from sparkctl.train.engines.reference import ReferenceEngine

floor = watch.floor(Run.open(root).manifest.plan.machine)
compute, loaded, calls, taken = ReferenceEngine.micro_step, load.load_text_model, itertools.count(1), []

def take():
    while not watched or available_memory() > 0.8 * floor:
        taken.append(np.ones(4 << 20, np.uint8))
    time.sleep(3 * watch.EVERY)

def micro_step(self, pack, scale):
    if next(calls) == number:
        take()
    return compute(self, pack, scale)

def load_text_model(*given, **named):
    if number == 0:
        take()
    return loaded(*given, **named)

if not watched:
    watch.floor = lambda machine: 0
watch.EVERY = 0.2
ReferenceEngine.micro_step = micro_step
load.load_text_model = load_text_model
sys.exit(app.run(["train", root]))
"""
LIMIT = 2 * GIB
FLOOR_MACHINE = Machine(name="a processor", device="cpu", memory=int(0.25 * GIB / watch.SHARE), cores=2)


@pytest.fixture
def limited() -> Iterator[Path]:
    """The file that takes a process into a control group with LIMIT bytes of memory and no swap."""
    base = Path("/sys/fs/cgroup")
    version_2 = (base / "cgroup.controllers").exists()
    folder = base / ("" if version_2 else "memory") / f"sparkctl-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (folder / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(LIMIT))
        swap = folder / ("memory.swap.max" if version_2 else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if version_2 else str(LIMIT))
        yield folder / "cgroup.procs"
    except OSError as error:
        pytest.skip(f"its memory cannot be limited: {error}")
    finally:
        remove(folder)


def remove(group: Path) -> None:
    """A group can go once the kernel has buried its last process."""
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{group} is still in use")


def trained_in(procs: Path, run: Run, number: int, watched: str) -> subprocess.CompletedProcess[str]:
    """Train in the group, short of memory in the micro-step of that number."""
    command = [sys.executable, "-c", PROGRAM, str(run.root), str(procs), str(number), watched]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("watched", ["watched", "unwatched"])
def test_in_a_group_with_a_limit(
    tmp_path: Path, llama_folder: Path, straight: Run, limited: Path, watched: str
) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, machine=FLOOR_MACHINE)
    done = trained_in(limited, run, BEGUN, watched)
    table = Run.open(run.root).manifest.train
    assert table
    if watched == "unwatched":
        assert done.returncode == -9, done.stderr  # what would have happened
        assert table.status == "running"
        return
    assert done.returncode == 1, done.stderr
    assert "error: interrupted after step" in done.stderr
    assert "hint: free some memory" in done.stderr
    assert table.status == "interrupted"
    assert app.run(["resume", str(run.root)]) == 0
    assert weights(run) == weights(straight)


@pytest.mark.parametrize("watched", ["watched", "unwatched"])
def test_loading_in_a_group_with_a_limit(
    tmp_path: Path, llama_folder: Path, straight: Run, limited: Path, watched: str
) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, machine=FLOOR_MACHINE)
    done = trained_in(limited, run, 0, watched)
    assert Run.open(run.root).manifest.train is None
    if watched == "unwatched":
        assert done.returncode == -9, done.stderr
        return
    assert done.returncode == 1, done.stderr
    assert "error: interrupted while the model was loaded; nothing to save; memory ran low (" in done.stderr
    assert "hint: free some memory" in done.stderr
    assert app.run(["train", str(run.root)]) == 0
    assert weights(run) == weights(straight)
