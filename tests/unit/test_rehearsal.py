from __future__ import annotations

import os
import resource
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ready
import torch
from untimed import untimed

from sparkctl.data.batches import Pack, make_pack
from sparkctl.errors import SparkError
from sparkctl.manifest.store import Run
from sparkctl.train import guard, random, rehearsal
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.session import Session


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    return ready.run(tmp_path / "run", llama_folder, count=24)


def session(run: Run, llama_folder: Path) -> Session:
    from sparkctl.data.tokens import TokenStore

    assert run.manifest.plan
    return Session.open(run.manifest.plan, llama_folder, TokenStore.open(run.root / "tokens"), name="r1")


def train(opened: Session, folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    from sparkctl.train.metrics import Metrics

    folder.mkdir()
    torch.rand(3)  # the generators are part of what is compared
    opened.loop(folder, Metrics(folder / "m.jsonl"), guard.Signals("", print), lambda *saved: None).run()
    lines = untimed(folder / "m.jsonl")
    return lines, {n: p.detach().clone() for n, p in opened.engine.parameters().items()} | random.capture()


def test_a_run_with_it_is_bit_equal_to_one_without(run: Run, llama_folder: Path, tmp_path: Path) -> None:
    lines, values = train(session(run, llama_folder), tmp_path / "without")
    rehearsed = session(run, llama_folder)
    folder = tmp_path / "rehearsed"
    rehearsed.rehearse(folder)
    assert list(folder.iterdir()) == []
    again_lines, again = train(rehearsed, tmp_path / "with")
    assert again_lines == lines
    assert all(torch.equal(again[name], values[name]) for name in values)


def test_what_it_draws_is_as_if_never_drawn(run: Run, llama_folder: Path, tmp_path: Path) -> None:
    opened = session(run, llama_folder)
    step = opened.engine.micro_step
    opened.engine.micro_step = lambda pack, scale: (torch.rand(1), step(pack, scale))[1]
    before = random.capture()
    opened.rehearse(tmp_path / "checkpoints")
    assert all(torch.equal(value, before[name]) for name, value in random.capture().items())


def test_it_evaluates_the_largest_pack(run: Run, llama_folder: Path, tmp_path: Path) -> None:
    opened = session(run, llama_folder)
    opened.held_out = [make_pack(opened.store, np.arange(count)) for count in (1, 3, 2)]
    tried: list[Pack] = []
    opened.engine.eval_sum = lambda pack: (tried.append(pack), torch.zeros(()))[1]
    opened.rehearse(tmp_path / "checkpoints")
    assert tried == [opened.held_out[1]]


def test_it_tries_every_pack_that_may_be_the_heaviest(
    run: Run, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session(run, llama_folder)
    packs = [make_pack(opened.store, np.array(rows)) for rows in ([0], [1, 2], [3])]
    monkeypatch.setattr(opened.schedule, "heaviest", lambda chunk: packs)
    tried: list[tuple[Pack, bool]] = []
    step = opened.engine.micro_step

    def watched(pack: Pack, scale: float) -> torch.Tensor:
        tried.append((pack, any(parameter.grad is not None for parameter in opened.engine.parameters().values())))
        return step(pack, scale)

    opened.engine.micro_step = watched
    opened.rehearse(tmp_path / "checkpoints")
    first, second, third = packs
    assert tried == [(first, False), (first, True), (second, True), (third, True)]
    assert all(parameter.grad is None for parameter in opened.engine.parameters().values())
    tried.clear()
    opened.plan.gradient_accumulation = 1
    opened.rehearse(tmp_path / "checkpoints")
    assert tried == [(first, False), (second, False), (third, False)]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize(("what", "named"), [("micro_step", "a pack of"), ("eval_sum", "held-out pack")])
def test_memory_fails_in_minute_one(
    run: Run, llama_folder: Path, tmp_path: Path, error: Exception, what: str, named: str
) -> None:
    def fail(self: ReferenceEngine, *arguments: object) -> None:
        raise error

    opened = session(run, llama_folder)
    setattr(opened.engine, what, fail.__get__(opened.engine))
    with pytest.raises(SparkError, match=rf"not enough memory for .*{named}") as caught:
        opened.rehearse(tmp_path / "checkpoints")
    assert "sparkctl recommend r1 --checkpointing" in str(caught.value.hint)


def test_an_allocation_that_really_fails_is_memory() -> None:
    with pytest.raises(SparkError, match="not enough memory for a test"), guard.memory("a test", "hint"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size of tensor"), guard.memory("a test", "hint"):
        torch.ones(2) + torch.ones(3)


def test_a_file_that_may_not_grow_is_said_with_its_place(run: Run, llama_folder: Path, tmp_path: Path) -> None:
    """As under `ulimit -f`."""
    opened, before = session(run, llama_folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            opened.rehearse(tmp_path / "checkpoints")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_full_disk_fails_in_minute_one(run: Run, llama_folder: Path, small_disk: Path) -> None:
    opened = session(run, llama_folder)
    folder = small_disk / "checkpoints"
    folder.mkdir()
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 20_000))
    with pytest.raises(SparkError, match="not even one checkpoint fits"):
        opened.rehearse(folder)
    assert list(folder.iterdir()) == []
    filler.unlink()
    opened.rehearse(folder)


def test_room_for_all_that_the_plan_keeps(
    run: Run, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session(run, llama_folder)
    usage = namedtuple("usage", "total used free")
    each = _checkpoint_size(opened, tmp_path)
    ask: Callable[[int], object] = lambda free: monkeypatch.setattr(  # noqa: E731
        rehearsal.shutil, "disk_usage", lambda path: usage(0, 0, free)
    )
    ask(each - 1)  # beside the one that lies there
    with pytest.raises(SparkError, match=r"the plan keeps 2 of .* at a time") as caught:
        opened.rehearse(tmp_path / "checkpoints")
    assert "sparkctl recommend r1 --keep 1" in str(caught.value.hint)
    ask(each)
    opened.rehearse(tmp_path / "checkpoints")


def _checkpoint_size(opened: Session, tmp_path: Path) -> int:
    from sparkctl.train import state

    (tmp_path / "one").mkdir()
    state.write(tmp_path / "one", opened.state, opened.optimizer)
    return state.size(tmp_path / "one")
