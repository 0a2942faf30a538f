"""Memory that runs out under a training: when it is seen, what the loop does, and what torch may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from looping import Training

from sparkctl.data.batches import Pack
from sparkctl.errors import Interrupted, SparkError, Terminated
from sparkctl.manifest.schema import Machine
from sparkctl.train import guard, state, watch

GIB = 1 << 30
SPARK = Machine(name="NVIDIA GB10", device="cuda", memory=112 * GIB, unified_memory=True, cores=20)
LAPTOP = Machine(name="a processor", device="cpu", memory=8 * GIB, cores=4)
H200 = Machine(name="NVIDIA H200", device="cuda", memory=140 * GIB, cores=16)


def wait(until: Callable[[], object]) -> None:
    """Until something is so; it fails after ten seconds."""
    end = time.monotonic() + 10
    while not until():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_the_floor_by_machine() -> None:
    assert watch.floor(SPARK) == int(0.02 * 112 * GIB) > 2 * GIB
    assert watch.floor(SPARK.model_copy(update={"memory": 20 * GIB})) == 2 * GIB
    assert watch.floor(LAPTOP) == int(0.02 * 8 * GIB)
    assert watch.floor(H200) == 0


def test_a_plan_that_fits_stays_above_the_floor() -> None:
    """What `recommend` leaves free is more than what the guard wants free."""
    from sparkctl.hardware.machine import CPU_RESERVE, HOST_RESERVE

    for total in (2 * GIB, 24 * GIB, 512 * GIB):
        planned = LAPTOP.model_copy(update={"memory": int(total * (1 - CPU_RESERVE))})
        assert watch.floor(planned) < total * CPU_RESERVE
    for total in (32 * GIB, 119 * GIB, 256 * GIB):
        planned = SPARK.model_copy(update={"memory": total - HOST_RESERVE})
        assert watch.floor(planned) < HOST_RESERVE


class Memory:
    """A reading that a test sets, and how often it was asked for."""

    def __init__(self, left: int) -> None:
        self.left, self.looks = left, 0
        self.when, self.then = 0, left

    def __call__(self) -> int:
        self.looks += 1
        if self.looks == self.when:
            self.left = self.then
        return self.left

    def after(self, looks: int, left: int) -> None:
        """Another reading from so many looks on."""
        self.when, self.then = looks, left


def stopped_at_step_4(training: Training, memory: Memory, left: int, machine: Machine) -> Interrupted:
    """Train, with so little left while the second pack of step 5 is computed."""

    def before(pack: Pack) -> None:
        if training.state.step == 4 and training.engine.table.grad is not None:
            memory.left, looked = left, memory.looks
            wait(lambda: memory.looks > looked + 1)

    training.engine.before = before
    with (
        pytest.raises(Interrupted) as caught,
        training.signals.caught(),
        watch.watched(machine, training.signals, memory, every=0.005),
    ):
        training.run()
    return caught.value


@pytest.mark.parametrize("machine", [SPARK, LAPTOP])
def test_under_the_floor_it_saves_and_the_rest_follows_bit_for_bit(tmp_path: Path, machine: Machine) -> None:
    straight = Training(tmp_path / "straight")
    straight.run()
    training = Training(tmp_path / "stopped")
    error = stopped_at_step_4(training, Memory(9 * GIB), int(0.9 * watch.floor(machine)), machine)
    assert (error.exit_status, error.message.split(";")[0]) == (1, "interrupted after step 4 of 6")
    assert f"the floor is {watch.floor(machine) / GIB:.2f} GiB" in error.message
    assert error.message.split("; ")[1:] == ["saved", error.reason]
    assert error.reason.startswith("memory ran low (")
    assert "free some memory" in str(error.hint)
    assert "`sparkctl resume r1`" in str(error.hint)
    assert list(training.lines("loss")) == [1, 2, 3, 4]
    again = Training(tmp_path / "stopped")
    again.state = state.load(tmp_path / "stopped" / "checkpoints" / "step-000004", again.optimizer)
    again.run()
    assert again.lines("loss") == straight.lines("loss")
    assert torch.equal(again.engine.table, straight.engine.table)


def test_above_the_floor_it_trains_on(tmp_path: Path) -> None:
    training, memory = Training(tmp_path), Memory(watch.floor(LAPTOP))
    training.engine.before = lambda pack: time.sleep(0.002)
    with watch.watched(LAPTOP, training.signals, memory, every=0.001):
        training.run()
    assert memory.looks > 5
    looked = memory.looks
    time.sleep(0.02)
    assert memory.looks == looked  # nobody looks after the end


def test_where_hardly_anything_is_left_it_stops_at_once(tmp_path: Path) -> None:
    training = Training(tmp_path)
    done: list[int] = []

    def before(pack: Pack) -> None:
        if training.state.step == 4:
            memory.left = watch.floor(SPARK) // 4
            with suppress(Exception):  # a library's
                wait(lambda: False)  # a pack that takes long: the exception comes into it
        done.append(training.state.step)

    training.engine.before, memory = before, Memory(9 * GIB)
    with (
        pytest.raises(Interrupted, match=r"at once, without saving; memory ran low \(0.56 GiB left") as caught,
        training.signals.caught(),
        watch.watched(SPARK, training.signals, memory, every=0.005),
    ):
        training.run()
    assert caught.value.exit_status == 1
    assert max(done) == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def loading(lock: threading.Lock) -> None:
    """A library that takes every failure for its own and goes on, while the main thread waits for others."""
    try:
        lock.acquire()
    except Exception:
        pytest.fail("the library heard it")


def test_while_nothing_is_to_be_saved_it_stops_under_the_floor() -> None:
    """At once, though the floor is not half gone; also where the main thread waits for a lock."""
    memory, taken = Memory(9 * GIB), threading.Lock()
    taken.acquire()
    memory.after(3, int(0.9 * watch.floor(SPARK)))
    handler = signal.getsignal(guard.KNOCK)
    with pytest.raises(Interrupted) as caught, watch.watched_alone(SPARK, "the model was loaded", memory, every=0.005):
        loading(taken)
    error = caught.value
    assert error.exit_status == 1
    assert error.message == f"interrupted while the model was loaded; nothing to save; {error.reason}"
    assert error.reason == "memory ran low (2.02 GiB left, the floor is 2.24 GiB)"
    assert "free some memory" in str(error.hint)
    assert "run the same command again" in str(error.hint)
    assert signal.getsignal(guard.KNOCK) == handler
    looked = memory.looks
    time.sleep(0.02)
    assert memory.looks == looked  # nobody looks after the end


def test_a_signal_from_without_ends_work_with_nothing_to_save_as_sigterm_does() -> None:
    with pytest.raises(Terminated), watch.watched_alone(H200, "the model was loaded"):
        signal.raise_signal(guard.KNOCK)


def test_work_with_nothing_to_save_goes_on_above_the_floor_and_on_other_machines() -> None:
    memory, none = Memory(watch.floor(LAPTOP)), Memory(0)
    with (
        watch.watched_alone(LAPTOP, "the model was loaded", memory, every=0.001),
        watch.watched_alone(H200, "the model was loaded", none, every=0.001),
    ):
        wait(lambda: memory.looks > 5)
    assert none.looks == 0


def test_a_gpu_with_its_own_memory_is_not_watched(tmp_path: Path) -> None:
    training, memory = Training(tmp_path), Memory(0)
    with watch.watched(H200, training.signals, memory, every=0.001):
        training.run()
    assert (memory.looks, training.signals.asked) == (0, False)


def test_an_allocation_that_fails_is_told(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def before(pack: Pack) -> None:
        if training.state.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    training.engine.before = before
    with (
        pytest.raises(SparkError, match="not enough memory for the next step") as caught,
        watch.watched(LAPTOP, training.signals, Memory(9 * GIB)),
    ):
        training.run()
    assert "`sparkctl resume r1`" in str(caught.value.hint)


def test_ranks_agree() -> None:
    here, there = (guard.Signals("sparkctl resume r1", lambda text: None) for _ in range(2))
    assert not here.agreed([0.0, 0.0])
    there.short_of_memory("1 GiB left", at_once=False)
    both = [a + b for a, b in zip(here.flags(), there.flags(), strict=True)]
    assert here.agreed(both)
    assert there.agreed(both)
    assert here.stopped("interrupted").message == "interrupted; memory ran low (on another rank)"
    assert there.stopped("interrupted").message == "interrupted; memory ran low (1 GiB left)"


def test_a_signal_that_torchrun_passes_on_is_the_same_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ECHO", 0.2)
    signals = guard.Signals("sparkctl resume r1", lambda text: None, relayed=True)

    def told() -> None:
        with signals.caught():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.25)
            signal.raise_signal(signal.SIGTERM)  # another rank has ended
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at once") as stopped:
        told()
    assert stopped.value.exit_status == 128 + signal.SIGINT  # of the last


def test_torch_may_take_what_is_available_less_the_host_s_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    total = type("Properties", (), {"total_memory": 120 * GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    monkeypatch.setattr(guard, "available_memory", lambda: 66 * GIB)
    guard.limit_memory(SPARK)
    guard.limit_memory(H200)
    assert given == [0.5]
    monkeypatch.setattr(guard, "available_memory", lambda: 5 * GIB)
    with pytest.raises(SparkError, match=r"5\.0 GiB of memory are left, and the host keeps 6 GiB"):
        guard.limit_memory(SPARK)
    assert given == [0.5]
