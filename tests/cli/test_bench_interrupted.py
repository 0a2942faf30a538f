"""A benchmark that a signal ends: what was measured is said at once, kept and printed; the status says why."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkctl_kernels import gemm, ways

from sparkctl.bench import kernels, products, step
from sparkctl.bench.setting import Setting, setting
from sparkctl.bench.step import Row
from sparkctl.bench.worker import Measured
from sparkctl.cli import app
from sparkctl.errors import AGAIN, SparkError, Terminated
from sparkctl.hardware import measurements
from sparkctl.hardware.measurements import Kind

STOPS = [(KeyboardInterrupt(), 130), (Terminated(), 143)]
PARTS = [("step",), ("synthetic",), ("mtp",)]


def measured(stack: str, seconds: float = 0.5) -> Measured:
    return Measured(stack, 1.0, 10, 4, False, {}, 1.0, seconds, seconds, seconds, peak_memory=3 << 30)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, int], None]:
    """The stacks are not run: so many give a figure, then that is raised where the next one would be waited for."""

    def plan(stop: BaseException, after: int) -> None:
        calls = iter(range(100))

        def measure(name: str, *_: Any) -> Measured:
            if next(calls) == after:
                raise stop
            return measured(name)

        monkeypatch.setattr(step, "_measure", measure)

    return plan


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = app.run(["bench", *words, "--pack", "64", "--documents", "2"])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(("stop", "status"), STOPS)
@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_stacks_that_are_done_are_the_answer(
    part: tuple[str], stop: BaseException, status: int, stopped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stacks = ("--stacks", "native,transformers" if part == ("mtp",) else "native,peft-fla")
    stopped(stop, 1)
    found, out, err = run(capsys, *part, *stacks)
    assert found == status
    assert "native: 128 tok/s, 500.0 ms, 3.0 GiB\n" in err
    assert err.endswith(f"error: interrupted\nhint: {AGAIN}\n")
    assert "128" in next(line for line in out.splitlines() if line.startswith("native"))
    stopped(stop, 1)
    found, out, err = run(capsys, *part, *stacks, "--json")
    said = json.loads(out)
    assert (found, said["ok"], said["error"], said["exit_status"]) == (status, False, "interrupted", status)
    assert [row["stack"] for row in said["stacks"]] == ["native"]
    assert said["stacks"][0]["tokens_per_second"] == 128


def test_with_nothing_done_there_is_nothing_to_show(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(Terminated(), 0)
    assert run(capsys, "step", "--stacks", "native")[:2] == (143, "")
    stopped(Terminated(), 0)
    status, out, _ = run(capsys, "step", "--stacks", "native", "--json")
    assert (status, set(json.loads(out))) == (143, {"ok", "error", "hint", "exit_status"})


@pytest.mark.parametrize(("stop", "status"), STOPS)
def test_operators_that_are_done_are_the_answer(
    stop: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = kernels.measure, iter(range(100))

    def until_stopped(*arguments: Any) -> kernels.Row:
        if next(calls) == 1:
            raise stop
        return measure(*arguments)

    monkeypatch.setattr(kernels, "measure", until_stopped)
    line = ["bench", "kernels", "--tokens", "60", "--documents", "3", "--calls", "1", "--json"]
    assert app.run(line) == status
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert (report["ok"], [row["operator"] for row in report["operators"]]) == (False, ["rms_norm"])
    assert re.search(r"^rms_norm: [\d.]+ ms, \d+% of the ceiling$", said.err, re.MULTILINE)


@pytest.mark.parametrize(("stop", "status"), STOPS)
def test_products_that_are_done_are_the_answer_and_no_choice(
    stop: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, with a clock of the test. Trainings do not take the ways of the half that was measured."""
    at = setting(shape="qwen3.5-2b", mode="lora", pack=64, documents=2)
    gpu = replace(at, machine=at.machine.model_copy(update={"device": "cuda"}))
    monkeypatch.setattr("sparkctl.bench.setting.setting", lambda **_: gpu)
    monkeypatch.setattr(gemm, "fused", lambda _: True)
    monkeypatch.setattr(ways, "WAYS", {name: ways.WAYS[name] for name in ("torch", "halves")})
    measure, calls, kept = products.measure, iter(range(1000)), list[object]()

    def clock(_: Callable[[], None]) -> float:
        if (call := next(calls)) == 5:  # the second way of the third product
            raise stop
        return 1.0 - 0.5 * (call % 2)

    monkeypatch.setattr(products, "measure", lambda work, _, tell: measure(work, torch.device("cpu"), clock, tell))
    monkeypatch.setattr(products, "keep_ways", lambda *arguments: kept.append(arguments))
    assert app.run(["bench", "products", "--tokens", "64"]) == status
    said = capsys.readouterr()
    assert len(re.findall(r"^gemm \S+ \S+: halves, 2.00 times torch's rate$", said.err, re.MULTILINE)) == 2
    assert said.err.endswith(f"error: interrupted\nhint: {AGAIN}\n")
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == ["product", "gemm", "gemm", "nothing"]
    calls = iter(range(1000))
    assert app.run(["bench", "products", "--tokens", "64", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["kept"], len(report["products"])) == (False, False, 2)
    assert kept == []


def test_a_failed_stack_is_said_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> Measured:
        raise SparkError("stack `native` failed: it broke")

    monkeypatch.setattr(step, "_measure", fail)
    status, _, err = run(capsys, "step", "--stacks", "native")
    assert status == 1
    assert err.endswith("measuring native\nstack `native` failed: it broke\n")


def test_sigterm_from_outside_while_a_stack_runs(tmp_path: Path) -> None:
    """The installed command, as `timeout` ends it: the first stack's row is printed, the second's process is gone."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW.format(mark=str(tmp_path / "worker")))
    command = [sys.executable, "-m", "sparkctl", "bench", "step", "--stacks", "native,peft-fla", "--json"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    with subprocess.Popen(
        [*command, "--pack", "64", "--documents", "2", "--steps", "1"],
        stdout=-1, stderr=-1, text=True, env=environment,
    ) as running:  # fmt: skip
        mark = tmp_path / "worker"
        deadline = time.monotonic() + 120
        while not mark.exists() or not mark.read_text():
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=30)
    said = json.loads(out)
    assert (running.returncode, said["ok"], [row["stack"] for row in said["stacks"]]) == (143, False, ["native"])
    assert said["stacks"][0]["tokens_per_second"] > 0
    assert "native: " in err
    assert not Path("/proc", mark.read_text()).exists()


SLOW = """
import os, pathlib, sys, time
if sys.argv[1:2] == ["peft-fla"] or "peft-fla" in sys.orig_argv:
    if "sparkctl.bench.worker" in sys.orig_argv:
        pathlib.Path({mark!r}).write_text(str(os.getpid()))
        time.sleep(300)
"""


@pytest.fixture
def at(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    return setting(shape="qwen3.5-2b", mode="lora", pack=64, documents=2, model=llama_folder)


def kept(at: Setting) -> list[tuple[str, int, float]]:
    assert at.model_key
    found = measurements.lookup(at.machine, Kind(at.model_key, "lora", at.work.rank, False))
    return [(one.engine, one.pack_length, one.tokens_per_second) for one in found]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[Row]]:
    monkeypatch.setattr(step, "_measure", lambda name, *_: measured(name))
    return step.bench_step


def test_a_rate_is_kept_for_recommend_before_the_next_stack_runs(at: Setting, rows: Any, llama_folder: Path) -> None:
    from sparkctl.files import sha256_file

    assert at.model_key == sha256_file(llama_folder / "config.json")
    measuring = rows(at, ["peft-fla", "native", "stock"])
    next(measuring)
    assert kept(at) == []  # a rival is no engine of ours
    next(measuring)
    assert kept(at) == [("native", 64, 128.0)]


def test_a_training_s_own_rate_stands(at: Setting, rows: Any) -> None:
    assert at.model_key
    kind = Kind(at.model_key, "lora", at.work.rank, False)
    measurements.record(at.machine, kind, "native", 77.0, 64, "2026-11-26T00:00:00Z")
    list(rows(at, ["native"]))
    assert kept(at) == [("native", 64, 77.0)]


def test_a_later_benchmark_replaces_an_earlier_one(at: Setting, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    list(rows(at, ["native"]))
    monkeypatch.setattr(step, "_measure", lambda name, *_: measured(name, seconds=0.25))
    list(rows(at, ["native"]))
    assert kept(at) == [("native", 64, 256.0)]


def test_two_micro_steps_or_a_shape_alone_are_no_rate_to_keep(at: Setting, rows: Any) -> None:
    list(rows(at, ["native"], steps=2))
    assert kept(at) == []
    list(rows(replace(at, model_key=None), ["native"]))
    assert kept(at) == []
