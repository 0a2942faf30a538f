"""`sparkctl train` as two ranks: one writes, both compute the same, and one that is left alone says so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ready
import torch
from forking import mend_threads
from sparkctl_kernels import ways
from sparkctl_kernels.gated_delta import op as gated_delta
from striking import at_step
from two_ranks import free_port, two_ranks
from untimed import untimed

from sparkctl.cli import app
from sparkctl.errors import UsageError
from sparkctl.hardware import measurements
from sparkctl.manifest.store import Run
from sparkctl.mtp.engine import HeadEngine
from sparkctl.steps import gate, record, training, verify_lossless
from sparkctl.steps.train import train
from sparkctl.train import guard, state
from sparkctl.train.engines.device import planned_device
from sparkctl.train.engines.native.engine import NativeEngine
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.metrics import Metrics
from sparkctl.train.ranks import compute_on_own_gpu


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A training, not begun."""
    return ready.run(tmp_path / "run", llama_folder, count=24)


def lines(run: Run) -> list[dict[str, Any]]:
    return untimed(run.root / "metrics.jsonl")


def _said(rank: int, folder: str, *words: str) -> int:
    """The exit status of a command in this rank; what it says goes into files."""
    with open(f"{folder}/{rank}.out", "w") as sys.stdout, open(f"{folder}/{rank}.err", "w") as sys.stderr:
        return app.run([*words, "--json"])


def _trained(rank: int, root: str, folder: str) -> None:
    assert _said(rank, folder, "train", root) == 0


def test_under_torchrun_the_ranks_share_a_step_and_the_first_writes(
    run: Run, tmp_path: Path, llama_folder: Path
) -> None:
    alone = ready.run(tmp_path / "alone", llama_folder, count=24)
    train(alone.root)
    two_ranks(_trained, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.out").read_text().count('"ok": true') for rank in (0, 1)] == [1, 0]
    assert "go round" not in (tmp_path / "0.err").read_text()
    assert Run.open(run.root).manifest.train.status == "done"
    got, wanted = lines(run), lines(alone)
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # the order of sums; observed 2e-6


def test_packs_that_do_not_go_round_are_told_of(tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, gradient_accumulation=3, max_steps=2)
    two_ranks(_trained, str(run.root), str(tmp_path))
    said = (tmp_path / "0.err").read_text()
    assert (
        "a step has 3 packs for 2 processes, of which some wait for the others; "
        "packs of 48 tokens (`--pack-length`) would go round\n" in said
    )
    assert "go round" not in (tmp_path / "1.err").read_text()


def _choosing(rank: int, root: str, folder: str) -> None:
    """A rank whose tuner finds what no other's does."""

    def pin(engine: ReferenceEngine, choices: dict[str, str]) -> None:
        Path(folder, f"{rank}.pinned").write_text(choices["tile"])

    ReferenceEngine.choices = lambda engine: {"tile": f"of rank {rank}"}  # type: ignore[method-assign]
    ReferenceEngine.pin = pin  # type: ignore[method-assign]
    _trained(rank, root, folder)


def test_every_rank_computes_by_the_choices_that_are_written_down(run: Run, tmp_path: Path) -> None:
    two_ranks(_choosing, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.pinned").read_text() for rank in (0, 1)] == ["of rank 0"] * 2
    assert Run.open(run.root).manifest.train.choices == {"tile": "of rank 0"}


def _leaving(rank: int, root: str, folder: str) -> None:
    """The second ends in its first micro-step without a word."""
    if rank == 1:
        at_step(pytest.MonkeyPatch(), ReferenceEngine, 1, lambda engine: os._exit(0))
    with open(f"{folder}/{rank}.err", "w") as sys.stderr:
        Path(folder, f"{rank}.status").write_text(str(app.run(["train", root])))


def test_a_rank_that_is_left_alone_says_so(run: Run, tmp_path: Path) -> None:
    two_ranks(_leaving, str(run.root), str(tmp_path))
    assert (tmp_path / "0.status").read_text() == "1"
    said = (tmp_path / "0.err").read_text()
    assert re.search(r"error: rank 0 lost another rank, or never met it: \S.+\nhint: the other's own words", said)
    assert "Traceback" not in said
    assert Run.open(run.root).manifest.train.status == "failed"


def _stopping(rank: int, root: str, folder: str) -> None:
    """Both are told to stop in their seventh micro-step, by a service manager and then by torchrun."""
    write = state.write

    def strike(engine: ReferenceEngine) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    def slow(*arguments: Any) -> None:
        time.sleep(0.4)
        write(*arguments)

    at_step(pytest.MonkeyPatch(), ReferenceEngine, 7, strike)
    state.write = slow
    assert _said(rank, folder, "train", root) == 143
    Path(folder, f"{rank}.left").write_text(str(Run.open(Path(root)).manifest.train.status))


def test_no_rank_that_is_stopped_leaves_before_the_first_has_saved(tmp_path: Path, llama_folder: Path) -> None:
    """torchrun ends them all when one has left."""
    run = ready.run(tmp_path / "run", llama_folder, count=24, epochs=4)
    two_ranks(_stopping, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.left").read_text() for rank in (0, 1)] == ["interrupted"] * 2
    assert Run.open(run.root).manifest.train.step == 4
    go_on = f"hint: torchrun --nproc-per-node 2 -m sparkctl resume {run.root}\n"
    assert go_on in (tmp_path / "0.err").read_text()


def _hurrying(rank: int, root: str, folder: str) -> None:
    """Both are told to stop; the second leaves at once, and torchrun tells the first again while it saves."""
    save, struck = state.save, threading.Event()

    def strike(engine: ReferenceEngine) -> None:
        struck.set()
        signal.raise_signal(signal.SIGTERM)

    def late(*arguments: Any) -> Path:
        if struck.is_set():
            time.sleep(0.3)
            signal.raise_signal(signal.SIGTERM)
        return save(*arguments)

    def leave(signals: guard.Signals, message: str) -> Any:
        os._exit(0)

    at_step(pytest.MonkeyPatch(), ReferenceEngine, 7, strike)
    guard.ECHO = 0.1
    if rank == 0:
        state.save = late
        assert _said(rank, folder, "train", root) == 143
    else:
        guard.Signals.stopped = leave  # type: ignore[method-assign]
        _said(rank, folder, "train", root)


def test_what_the_first_saves_is_saved_though_another_has_left(tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "run", llama_folder, count=24, epochs=4)
    two_ranks(_hurrying, str(run.root), str(tmp_path))
    assert "; saved\n" in (tmp_path / "0.err").read_text()
    assert Run.open(run.root).manifest.train.step == 4


def test_a_rate_is_of_the_steps_that_so_many_processes_took(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Any, float]] = []
    monkeypatch.setattr(measurements, "record", lambda machine, kind, engine, rate, *_: kept.append((kind, rate)))
    with closing(Metrics(run.root / "metrics.jsonl")) as metrics:
        for step in range(1, 81):
            metrics.write(step=step, loss=1.0, tokens=100, seconds=1.0 if step <= 40 else 0.5)
    record.note_rate(training.planned(run), 2, 40)
    ((kind, rate),) = kept
    assert (kind.processes, rate) == (2, 200.0)


def _resumed(rank: int, root: str, folder: str) -> None:
    assert _said(rank, folder, "resume", root, "--from", "step-000003") == 0


def test_a_training_that_goes_on_in_more_processes_says_that_its_sums_are_others(run: Run, tmp_path: Path) -> None:
    train(run.root)
    assert Run.open(run.root).manifest.train.processes == 1
    two_ranks(_resumed, str(run.root), str(tmp_path))
    said = (tmp_path / "0.err").read_text()
    assert "not bit for bit what an uninterrupted run gives; it began with processes 1, now 2\n" in said
    assert "resuming from step-000003" in said
    assert (tmp_path / "1.err").read_text() == ""
    assert Run.open(run.root).manifest.train.processes == 2


def _changing(rank: int, root: str, folder: str) -> None:
    """The second has read the run when its plan changes."""
    joined = training.joined

    def late() -> Any:
        with Run.open(Path(root)).edit() as manifest:
            manifest.plan.max_steps = 2
        return joined()

    if rank == 1:
        training.joined = late  # type: ignore[assignment]
    assert _said(rank, folder, "train", root) == 0


@pytest.mark.timeout(60)  # ranks with other plans wait for each other without end
def test_all_ranks_train_by_what_the_first_reads_once_it_holds_the_run(run: Run, tmp_path: Path) -> None:
    two_ranks(_changing, str(run.root), str(tmp_path))
    assert Run.open(run.root).manifest.train.steps == 2


def _refused(rank: int, root: str, folder: str) -> None:
    assert _said(rank, folder, "resume", root) == 2


def test_the_first_rank_alone_answers_a_failure_too(run: Run, tmp_path: Path) -> None:
    two_ranks(_refused, str(run.root), str(tmp_path))
    assert [(tmp_path / f"{rank}.out").read_text().count('"ok": false') for rank in (0, 1)] == [1, 0]
    assert [(tmp_path / f"{rank}.err").read_text().count("error: ") for rank in (0, 1)] == [1, 1]


def _gated(rank: int, root: str, folder: str) -> None:
    gate._parent_loss = lambda *_: 0.1
    assert _said(rank, folder, "train", root, "--gate", "0") == (1 if rank == 0 else 0)


def test_the_first_rank_alone_fails_at_the_gate_which_it_has_to_write_down(
    run: Run, tmp_path: Path, llama_folder: Path
) -> None:
    train(run.root)
    child = ready.run(tmp_path / "child", llama_folder, parent=Run.open(run.root), count=24)
    two_ranks(_gated, str(child.root), str(tmp_path))
    assert Run.open(child.root).manifest.train.gate.passed is False


def _certified(rank: int, root: str, folder: str, alike: bool) -> None:
    """The second has its certificate sooner than the first, and it fails, the first's too where they are alike."""
    kept, passed = Path(folder, "kept"), rank == 0 and not alike
    lossy = SimpleNamespace(passed=passed, problems=[] if passed else ["planted"], engine="native")

    def certified(*_: Any) -> tuple[Any, None]:
        time.sleep(0 if rank else 0.5)
        return lossy, None

    verify_lossless.certified = certified  # type: ignore[assignment]
    verify_lossless._keep = lambda run, table, ranks: kept.touch() if ranks.writes else None
    assert _said(rank, folder, "train", root) == 1
    assert kept.exists()


@pytest.mark.parametrize("alike", [True, False])
def test_no_rank_leaves_for_an_engine_s_faults_before_the_first_has_written_them_down(
    tmp_path: Path, llama_folder: Path, alike: bool
) -> None:
    run = ready.run(tmp_path / "run", llama_folder, engine="native")
    with run.edit() as manifest:
        manifest.plan.estimates.seconds = 2 * verify_lossless.LONG
    two_ranks(_certified, str(run.root), str(tmp_path), alike)
    problem = "planted" if alike else "on another rank"
    assert f"is not lossless with this model on this machine: {problem}\n" in (tmp_path / "0.err").read_text()


Waiting = tuple[BaseProcess, Callable[[], None]]


def _joining(port: int, root: str, folder: str) -> None:
    mend_threads()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "1"}
    os.environ["LOCAL_RANK"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.exit(_said(1, folder, "train", root))


@pytest.fixture
def waiting(run: Run, tmp_path: Path) -> Iterator[Waiting]:
    """A second rank that waits for a first, and what ends the place where they would meet."""
    port = free_port()
    meeting = [torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    forked = torch.multiprocessing.get_context("fork")
    process = forked.Process(target=_joining, args=(port, str(run.root), str(tmp_path)))
    process.start()
    try:
        while process.is_alive() and meeting[0].num_keys() < 2:  # one of them is the store's own
            time.sleep(0.02)
        yield process, meeting.clear
    finally:
        process.kill()
        process.join()


def test_a_rank_that_waits_for_one_who_does_not_come_can_be_ended(waiting: Waiting) -> None:
    waiting[0].terminate()
    waiting[0].join(10)
    assert waiting[0].exitcode == -signal.SIGTERM


def test_a_rank_whose_meeting_place_is_gone_says_so(waiting: Waiting, tmp_path: Path) -> None:
    waiting[1]()
    waiting[0].join(10)
    assert waiting[0].exitcode == 1
    assert "error: rank 1 lost another rank, or never met it: " in (tmp_path / "1.err").read_text()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of two boxes
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        compute_on_own_gpu()
    assert taken == [0, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="3 processes for 2 GPUs of this machine") as refused:
        compute_on_own_gpu()
    assert refused.value.hint == "start as many: `torchrun --nproc-per-node 2 …`"


@pytest.mark.parametrize("engine", [NativeEngine, HeadEngine])
def test_an_engine_takes_the_tiles_and_the_products_of_the_first(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, str]] = []
    monkeypatch.setattr(gated_delta, "pin", taken.append)
    first = {"a kernel": "BV=32", "gemm nt 48x300x200": "halves"}
    ways.pin({"gemm nn 1x2x3": "halves"})  # as was measured on this rank's machine
    try:
        engine.pin(object(), first)
        assert (taken, ways.pinned()) == ([first], {"gemm nt 48x300x200": "halves"})
    finally:
        ways.pin({})


def test_a_rank_computes_on_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert planned_device("cuda", "RUN") == torch.device("cuda", 1)
    assert planned_device("cpu", "RUN") == torch.device("cpu")


def test_a_world_that_no_torchrun_made_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.run(["train", str(run.root)]) == 2
    said = capsys.readouterr().err
    assert (
        "error: WORLD_SIZE is 2, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT\nhint: start this by `torchrun`"
        in said
    )


LINGERING = """
import sys, threading
from sparkctl.cli import app
threading.Thread(target=threading.Event().wait).start()  # as NCCL's wait for a rank that does not come
sys.argv = ["sparkctl", "show", "nowhere"]
app.main()
"""


def test_a_rank_that_failed_waits_for_nothing(tmp_path: Path) -> None:
    command, several = [sys.executable, "-c", LINGERING], {**os.environ, "WORLD_SIZE": "2"}
    ended = subprocess.run(command, cwd=tmp_path, env=several, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
