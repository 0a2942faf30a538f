"""The fast path as it was exercised: what its answers mean, and that a race or a wrong gradient is seen."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparkctl import child
from sparkctl.doctor import chip, exercise, fastpath, software, targets
from sparkctl.doctor.chip import Row
from sparkctl.doctor.fastpath import FastPath, Operator, Proof, Speed
from sparkctl.doctor.findings import Weight
from sparkctl.doctor.software import Installed
from sparkctl.hardware import nvml
from sparkctl.hardware.nvml import Gpu, Reading
from sparkctl.progress import silent
from sparkctl.steps import doctor

CPU = torch.device("cpu")
PROOF = Proof(1.1, "layers.0.q_proj", 0.9, 30, [], 12.0)
GOOD = FastPath(
    [Operator("attention", "triton", "fused kernel of this project")], PROOF, Speed("NVIDIA GB10", 88e12, 240e9)
)

CASES = [
    (replace(GOOD, problems={"proof": "died of SIGSEGV"}), Weight.NEEDED, "the fast path: died", "exercise proof"),
    (replace(GOOD, problems={"speed": "did not end within 60 s"}), Weight.SLOW, "speed of the fast path", "speed"),
    (
        replace(GOOD, operators=[Operator("gated_delta", "reference", "fla is not installed", True, "pip install it")]),
        Weight.NEEDED, "gated_delta would run on its slow reference", "pip install it",
    ),
    (replace(GOOD, proof=replace(PROOF, ratio=2.1)), Weight.NEEDED, "2.1 times as far", "--engine reference"),
    (replace(GOOD, proof=replace(PROOF, ratio=float("nan"))), Weight.NEEDED, "nan times", "--engine reference"),
    (replace(GOOD, proof=replace(PROOF, differing=[3, 9])), Weight.NEEDED, "2 of 30 repeats", "triton>=3.8"),
    (replace(GOOD, speed=Speed("NVIDIA GB10", 30e12, 240e9)), Weight.SLOW, "33% of", "says why"),
    (replace(GOOD, speed=Speed("NVIDIA H200", 780e12, 2e12)), Weight.SLOW, "2000 GB/s, 48% of", "nvidia-smi"),
    (replace(GOOD, speed=Speed("NVIDIA H200", 280e12, 2e12, busy=97)), Weight.SLOW, "97 % of the time", "says who"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "weight", "what", "mend"), CASES)
def test_a_rule(found: FastPath, weight: Weight, what: str, mend: str) -> None:
    (finding,) = fastpath.judge(found)
    assert finding.weight == weight
    assert what in finding.what
    assert mend in finding.mend


COMMAND = re.compile(r"(pip|sparkctl) [^`;]+|`[^`]+`( says (why|who))?")


def test_only_a_spark_is_told_of_its_power_supply() -> None:
    for name, told in (("NVIDIA GB10", True), ("NVIDIA H200", False)):
        (finding,) = fastpath.judge(replace(GOOD, speed=Speed(name, 30e12, 4800e9)))
        assert ("power supply" in finding.what) == told


def test_every_mend_is_a_command() -> None:
    """Those of operators are their own; one that has none is allowed by name."""
    slow = replace(GOOD, operators=[Operator("x", "reference", "why", True)])
    for found, *_ in (*CASES, (slow,)):
        (finding,) = fastpath.judge(found)
        assert finding.mend
        assert finding.mend == "pip install it" or COMMAND.fullmatch(finding.mend)
    assert not COMMAND.fullmatch("train with `--allow-slow`")
    assert not COMMAND.fullmatch("pip install 'triton>=3.8', or `sparkctl recommend RUN --engine reference`")


def test_every_rule_has_a_case() -> None:
    assert all(any(list(rule(found)) for found, *_ in CASES) for rule in fastpath.RULES)


def test_nothing_is_wrong_with_a_good_one() -> None:
    assert fastpath.judge(GOOD) == []
    assert fastpath.judge(replace(GOOD, speed=Speed(None, 1e9, 1e9))) == []  # nobody said what a CPU should reach
    assert Speed("NVIDIA GB10", 90e12, 273e9).operations_share == pytest.approx(1.0)
    assert Speed("NVIDIA GeForce RTX 5090", 1.0, 1.0).bytes_share is None


TORCH = {"cuda": None, "architectures": [], "available": False}
RATES = {"gpu": None, "operations": 1e12, "bytes": 1e9}


def test_answers_that_do_not_come_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process said before it failed counts."""

    def answers(name: str, part: str, seconds: float) -> tuple[dict[str, Any], str | None]:
        assert seconds == fastpath.SECONDS[part]
        said = {"operators": [{"operator": "rms_norm", "kernel": "triton", "reason": "fused"}]}
        return (said if part == "proof" else {"torch": TORCH}), f"{part} died"

    monkeypatch.setattr(child, "answers", answers)
    found = fastpath.look(fastpath.rates())
    assert found == FastPath(
        [Operator("rms_norm", "triton", "fused")], problems={"proof": "proof died", "speed": "speed died"}
    )


def test_a_process_that_does_not_end_has_said_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import time\nprint('{\"torch\": 1}', flush=True)\nprint('a word')\nprint('{\"speed\": 2}', flush=True)\n"
    (tmp_path / "talks.py").write_text(body)
    (tmp_path / "hangs.py").write_text(body + "time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    both = {"torch": 1, "speed": 2}
    assert child.answers("talks", seconds=20) == (both, None)
    assert child.answers("hangs", seconds=3) == (both, "did not end within 3 s")
    assert child.answers("this", seconds=20) == ({}, "ended without an answer")


def test_the_whole_of_a_part_as_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exercise, "speed", lambda device: print("a word of torch's") or RATES)
    exercise.main("speed")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(one) for one in said] == [["torch"], ["speed"]]
    assert said[0]["torch"]["cuda"] == torch.version.cuda
    assert said[1]["speed"] == RATES


def side_by_side(monkeypatch: pytest.MonkeyPatch, answers: Any, answer: Any = None) -> doctor.Report:
    """Of a machine with torch and peft whose processes say that."""
    here: Any = SimpleNamespace(usable=True)
    installed = [
        Installed(one, "2.13.0") for one in software.LIBRARIES if one.name in ("torch", "peft", "numpy", "triton")
    ]
    monkeypatch.setattr(child, "answers", answers)
    monkeypatch.setattr(child, "answer", answer or answers)
    return doctor._side_by_side(doctor.Report(targets.parse("sm_121a"), here, [], installed), silent)[0]


def test_rates_are_measured_while_nothing_else_runs_and_the_rest_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the rest waits for all others to have begun: one after the other, they would wait in vain."""
    order: list[str] = []
    rest = threading.Barrier(4, timeout=20)

    def answer(name: str, part: str, seconds: float) -> tuple[dict[str, Any], str | None]:
        work(part, alone=part == fastpath.RATES)
        return ({"torch": TORCH, "speed": RATES}, None) if part == fastpath.RATES else ({}, "no answer")

    def imported(name: str, module: str, seconds: float) -> tuple[dict[str, Any], str | None]:
        if module != "numpy":
            work(module)
        return {}, None

    def work(part: str, alone: bool = False) -> None:
        order.append(part)
        time.sleep(0.05)  # for whatever else has begun
        if not alone:
            rest.wait()
        order.append(f"{part} ended")

    def rows(*given: Any, **named: Any) -> list[Row]:
        work("probes")
        return []

    monkeypatch.setattr(chip, "rows", rows)
    found = side_by_side(monkeypatch, answer, imported)
    assert order[:2] == [fastpath.RATES, f"{fastpath.RATES} ended"]
    assert sorted(order[2:6]) == ["peft", "probes", "proof", "triton"]  # torch is not imported again
    assert found.fast_path
    assert list(found.fast_path.problems) == ["proof"]
    assert [one.imports for one in found.software if one.library.name == "torch"] == [True]


def test_without_a_torch_that_can_be_imported_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, part: str, seconds: float) -> tuple[dict[str, Any], str | None]:
        asked.append(part)
        return {}, "did not end within 90 s" if part == fastpath.RATES else None

    monkeypatch.setattr(chip, "rows", lambda *given, **named: [])
    found = side_by_side(monkeypatch, answer)
    assert asked == ["numpy", "speed", "triton"]
    assert found.fast_path is None
    assert {one.library.name: one.problem for one in found.software} == {
        "torch": "did not end within 90 s", "peft": "not tried: torch cannot be imported", "numpy": None,
        "triton": None,
    }  # fmt: skip


def test_every_operator_of_a_hybrid_is_told() -> None:
    names = {part["operator"] for part in exercise.kernels(CPU)["operators"]}
    assert {"attention", "gated_delta", "causal_conv", "rms_norm", "linear_cross_entropy"} <= names


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "SIZES", {"cpu": (128, 1 << 20)})
    monkeypatch.setattr(exercise, "SECONDS", 0.05)
    found = exercise.speed(CPU)
    assert found["gpu"] is None
    assert found["operations"] > 1e8
    assert found["bytes"] > 1e8
    assert fastpath.Speed(**found).operations == found["operations"]


def test_clocks_are_watched_while_products_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        Gpu("NVIDIA GB10", "12.1", 1, clock=clock, most_clock=3003, power=power, throttled=held)
        for clock, power, held in ((650, 18.0, ("power brake",)), (None, None, ()), (640, 15.0, ()), (660, 17.0, ()))
    ]
    answers = iter(Reading(gpu) for gpu in gpus)
    monkeypatch.setattr(nvml, "here", lambda: next(answers, Reading(problem="gone")))
    monkeypatch.setattr(exercise, "TICK", 0.001)
    with exercise.watched() as seen:
        time.sleep(0.2)
    found = exercise.under_load(seen)
    assert found == {"clock": 650, "most_clock": 3003, "power": 17.0, "throttled": ["power brake"]}
    slow = replace(GOOD, speed=Speed("NVIDIA GB10", 25e12, 240e9, **found))
    assert "(at 650 of 3,003 MHz, 17 W, held down: power brake)" in fastpath.judge(slow)[0].what
    assert exercise.under_load([]) == {"clock": None, "most_clock": None, "power": None, "throttled": []}


class Racing:
    """An engine whose gradient differs in one bit of one repeat."""

    name = "racing"

    def __init__(self, when: int | None) -> None:
        self.device, self._when, self._calls = CPU, when, 0
        self._parameter = torch.nn.Parameter(torch.zeros(64))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"layers.0.q_proj.lora_A.weight": self._parameter}

    def micro_step(self, pack: Any, scale: float) -> torch.Tensor:
        gradient = torch.full((64,), 0.1)
        if self._calls == self._when:
            gradient[17] = torch.nextafter(gradient[17], torch.tensor(1.0))
        self._calls += 1
        self._parameter.grad = gradient
        return torch.tensor(3.0)


@pytest.mark.parametrize(("when", "differing"), [(None, []), (1, [1]), (30, [30])])
def test_one_bit_of_one_repeat_is_seen(when: int | None, differing: list[int]) -> None:
    assert exercise.repeated(Racing(when)) == differing  # type: ignore[arg-type]


def test_the_engine_is_held_beside_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where it is right: 1.00 at worst seen. A gradient that is 10 % too large is not: 6.9; 2.2 at 3 %."""
    from sparkctl.train.engines.native import engine

    monkeypatch.setattr(exercise, "PACKS", 2)
    monkeypatch.setattr(exercise, "REPEATS", 2)
    found = exercise.proof(CPU)
    assert (found["ratio"] < 1.9, found["differing"]) == (True, [])
    right = engine.NativeEngine.micro_step
    monkeypatch.setattr(engine.NativeEngine, "micro_step", lambda self, pack, scale: right(self, pack, 1.1 * scale))
    assert exercise.proof(CPU)["ratio"] > 3
