"""Launches through a driver that is not NVIDIA's: what it is given, and what each way of failing costs."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from fake_machine import build, drivers, no_drivers  # noqa: F401  # a fixture

from sparkctl import child
from sparkctl.doctor import launch
from sparkctl.doctor.launch import Claims, Launched

CUBIN = b"cubin of a probe"


@pytest.fixture
def fake(drivers: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:  # noqa: F811
    """Children find that driver; FAKE_CUDA says how it behaves."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(drivers))
    return monkeypatch


def run(words: int = 7, threads: int = 128, cluster: int = 1, shared: int = 0) -> Launched:
    return launch.launch(CUBIN, words=words, threads=threads, cluster=cluster, shared=shared)


def test_the_driver_gets_what_was_asked_for(fake: pytest.MonkeyPatch) -> None:
    grid, data, box = 7, 7, 64
    assert run() == Launched((grid, 128, 0, 1, 0, data, box))
    assert run(threads=1, cluster=2, shared=101_376) == Launched((grid, 1, 101_376, 2, 1, data, box))


def test_a_gpu_without_tensor_maps_gets_none(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_MAJOR", "8")
    assert run().words[-1] == 0


def test_too_much_shared_memory_is_refused(fake: pytest.MonkeyPatch) -> None:
    assert run(shared=101_380).problem == "error 1"


def test_clusters_that_the_gpu_does_not_have(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CUDA", "no-clusters")
    assert run(cluster=2) == Launched(problem="CUDA_ERROR_INVALID_CLUSTER_SIZE")
    assert run().problem is None


@pytest.mark.parametrize(("how", "problem"), [("trap", "CUDA_ERROR_LAUNCH_FAILED"), ("crash", "died of SIGSEGV")])
def test_a_trap_or_a_crash_is_an_answer(fake: pytest.MonkeyPatch, how: str, problem: str) -> None:
    fake.setenv("FAKE_CUDA", how)
    assert run() == Launched(problem=problem)


def test_a_kernel_that_hangs_is_an_answer(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CUDA", "hang")
    fake.setattr(launch, "SECONDS", 2.0)
    assert run() == Launched(problem="did not end within 2 s")


def test_a_gpu_that_is_full_was_not_tried(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CUDA", "full")
    assert run() == Launched(problem="CUDA_ERROR_OUT_OF_MEMORY", never=True)


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(no_drivers(tmp_path)))
    said = run()
    assert said.never
    assert said.problem == f"libcuda.so.1 cannot be loaded: {tmp_path / 'libcuda.so.1'}: file too short"
    built = build(tmp_path)
    (built / "libnvidia-ml.so.1").replace(built / "libcuda.so.1")  # a library without a function of CUDA's
    assert launch.claims().problem == "too old a driver library: libcuda.so.1: undefined symbol: cuInit"


def test_what_cuda_claims(fake: pytest.MonkeyPatch) -> None:
    assert launch.claims() == Claims(
        capability="12.1", driver=(13, 0), free=3 << 30, total=119 << 30, integrated=True, shared=101_376,
        registers=65_536,
    )  # fmt: skip


def test_what_cuda_claims_before_it_fails(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CUDA", "full")
    said = launch.claims()
    assert (said.problem, said.free, said.capability) == ("CUDA_ERROR_OUT_OF_MEMORY", None, "12.1")
    fake.setenv("FAKE_CUDA", "slow-context")
    assert launch.claims(1.5).problem == "did not end within 1.5 s"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 3", "exit status 3"),
        ("echo 'the reason' >&2; exit 1", "the reason"),
        ("kill -9 $$", "died of SIGKILL"),
        ("sleep 30 & sleep 30", "did not end within 0.5 s"),
    ],
)
def test_how_a_process_may_end(script: str, problem: str) -> None:
    assert child.run(["sh", "-c", script], seconds=0.5 if "sleep" in script else 20).problem == problem


def test_a_command_that_is_not_there() -> None:
    assert (
        child.run(["/no/such/ptxas"], seconds=1).problem == "`/no/such/ptxas` does not start: no such file or directory"
    )


def test_a_module_that_ends_without_an_answer() -> None:
    assert child.answer("this", seconds=20) == ({}, "ended without an answer")


def sleepers(count: int) -> list[child.Ended]:
    """A pool within a pool, as a look at something opens one: two at a time, each for half a minute."""
    with child.at_once(2) as pool:
        return list(pool.map(lambda _: child.run(["sleep", "30"], seconds=60), range(count)))


def test_a_signal_ends_what_inner_pools_wait_for_and_nothing_new_begins() -> None:
    began, both = time.monotonic(), list[Future[list[child.Ended]]]()

    def work() -> None:
        with child.at_once(2) as pool:
            both.extend(pool.submit(sleepers, 6) for _ in range(2))
            while len(child._running) < 4:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    ended = [one.problem for future in both for one in future.result()]
    assert time.monotonic() - began < 10
    assert ended.count("died of SIGKILL") == 4
    assert ended.count(child.INTERRUPTED) == 8
    assert child.run(["true"], seconds=5).problem is None  # that was then


def test_an_error_ends_its_own_pool_alone() -> None:
    with child.at_once(1) as pool:
        other = pool.submit(child.run, ["sleep", "1"], seconds=20)
        with pytest.raises(ValueError, match="a bug"), child.at_once(1):
            raise ValueError("a bug")
        assert other.result().problem is None
