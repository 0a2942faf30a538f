"""The rules at their boundaries."""

from __future__ import annotations

import math

import numpy as np
import plans
import pytest

from sparkctl.plan import rules
from sparkctl.train.engines import ENGINES

MILLION = 10**6


@pytest.mark.parametrize(
    ("examples", "tokens", "mode", "said"),
    [
        (50_000, 900 * MILLION, "lora", "up to 50,000"),
        (50_001, 900 * MILLION, "lora", "--mode full"),
        (99_999, 900 * MILLION, "lora", "--mode full"),
        (100_000, 200 * MILLION, "full", "more than adapters"),
        (100_000, 200 * MILLION - 1, "lora", "--mode full"),
        (10, 200 * MILLION, "lora", "up to 50,000"),
    ],
)
def test_mode(examples: int, tokens: int, mode: str, said: str) -> None:
    chosen = rules.mode(plans.analysis(plans.Store(np.array([10])), examples=examples, tokens=tokens))
    assert chosen.value == mode
    assert said in chosen.reason


def test_tokens_per_step_is_the_published_batch() -> None:
    analysis = plans.analysis(plans.Store(np.array([5354])))
    assert analysis.mean_length_128 == 5376
    assert rules.tokens_per_step(analysis).value == 16 * 5376


@pytest.mark.parametrize(
    ("longest", "tokens", "length"),
    [
        (300, 86016, 4096),  # short documents: not all launches
        (4096, 86016, 4096),
        (4097, 86016, 4224),  # the longest document, to a tile
        (9000, 4096, 9088),  # longer than a step: nothing is cut
        (300, 2048, 2048),  # never longer than a step
        (2000, 2048, 2048),
    ],
)
def test_pack_length(longest: int, tokens: int, length: int) -> None:
    assert rules.pack_length(longest, tokens, {}).value == length


def test_pack_length_by_measurement() -> None:
    rates = {2048: 900.0, 8192: 1200.0, 16384: 1100.0, 1024: 9999.0, 131072: 9999.0}
    chosen = rules.pack_length(2000, 86016, rates)
    assert chosen.value == 8192  # faster were 1,024, too short for the longest document, and more than a step
    assert "1,200" in chosen.reason
    assert rules.pack_length(2000, 86016, {8192: 1200.0}).value == 4096  # one alone is no comparison


@pytest.mark.parametrize(
    ("tokens", "length", "packs"), [(86016, 4096, 21), (4096, 9088, 1), (2048, 2048, 1), (100, 99, 1), (7000, 4096, 2)]
)
def test_accumulation(tokens: int, length: int, packs: int) -> None:
    assert rules.accumulation(tokens, length) == packs


def test_shrunk_packs_make_up_a_step() -> None:
    assert rules.even(3328, 300, 4096) == 2048
    assert rules.even(3328, 3000, 4096) == 3000
    assert rules.even(8192, 300, 4096) == 4096


@pytest.mark.parametrize(
    ("examples", "epochs"), [(999, 5), (1_000, 3), (9_999, 3), (10_000, 2), (99_999, 2), (100_000, 1)]
)
def test_epochs(examples: int, epochs: int) -> None:
    assert rules.epochs(examples).value == epochs


@pytest.mark.parametrize(
    ("mode", "parameters", "rate"),
    [("lora", 9e9, 2e-4), ("full", 9e9, 2e-5), ("lora", 27e9, 1e-4), ("full", 27e9, 1e-5), ("lora", 13e9, 2e-4)],
)
def test_learning_rate(mode: str, parameters: float, rate: float) -> None:
    assert rules.learning_rate(mode, int(parameters)).value == pytest.approx(rate)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (2, 1), (20, 2), (100, 10), (300, 10), (1000, 30), (100_000, 3000)]
)
def test_warmup(steps: int, warmup: int) -> None:
    assert rules.warmup_steps(rules.warmup_fraction(steps).value, steps) == warmup


@pytest.mark.parametrize("step_seconds", [0.05, 1.0, 30.0, 900.0, 4000.0])
@pytest.mark.parametrize("steps", [1, 7, 100, 5000])
def test_saves_are_never_half_an_hour_apart(steps: int, step_seconds: float) -> None:
    every = rules.save_every(steps, step_seconds, save_seconds=20.0).value
    assert every >= 1
    assert every * step_seconds <= 1800 or every == 1


def test_saves_cost_a_tenth_at_most_where_half_an_hour_allows() -> None:
    assert rules.save_every(1000, 0.1, save_seconds=20.0).value == 1000  # 2,000 steps would be a tenth
    assert rules.save_every(1000, 1.0, save_seconds=20.0).value == 200
    assert rules.save_every(1000, 1.0, save_seconds=1.0).value == math.ceil(1000 / rules.SAVES)


def test_only_engines_that_exist_are_offered() -> None:
    assert {*rules.AVAILABLE_ENGINES, *rules.EXTRA_ENGINES} == set(ENGINES)


def test_extras_are_offered_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    assert rules.engines() == ("native", "reference")
    assert rules.engine({"reference": 500.0, "native": 400.0, "unsloth": 900.0}).value == "reference"
    monkeypatch.setattr(rules, "find_spec", lambda name: name)
    assert rules.engines() == ("native", "reference", "unsloth")
    assert rules.engine({"reference": 500.0, "native": 400.0, "unsloth": 900.0}).value == "unsloth"


def test_engine_by_measurement() -> None:
    assert rules.engine({}).value == "native"
    assert rules.engine({"reference": 500.0}).value == "native"
    chosen = rules.engine({"reference": 500.0, "native": 400.0, "unsloth": 900.0})
    assert chosen.value == "reference"
    assert "500" in chosen.reason
    lacking = rules.engine({"reference": 5.0, "native": 400.0}, "the activation `gelu`")
    assert lacking.value == "reference"
    assert "gelu" in lacking.reason
