"""Throughput: measurements first, then the published table, then operations; always on the slow side."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import plans
import pytest

from sparkctl.hardware import measurements, throughput
from sparkctl.hardware.load import Load
from sparkctl.hardware.measurements import Kind, Layers, Probe, keep_ways, lookup, record, ways_here
from sparkctl.hardware.throughput import Rate, expected, from_probe, from_table, operations

KIND = Kind("2b", "lora", 128, False)
LOAD = Load("lora", 125_000_000, 128, 1024, 1024, 358, checkpointing=False, device="cuda", fla=True)
PUBLISHED = {"0.8b": 5650, "2b": 3568, "4b": 1712, "9b": 1095, "27b": 370}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder of the test's own."""
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ask(machine: plans.Machine, *, mode: str = "lora", engine: str = "reference", length: int = 1024) -> Rate:
    """The rate of a 2B."""
    load = replace(LOAD, mode=mode)
    shape = plans.model("2b").shape
    return expected(machine, shape, load, engine, model_key="2b", parameters=2_213_000_000, pack_length=length)


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_the_published_table(size: str) -> None:
    rate = from_table(plans.SPARK, plans.model(size).shape, LOAD, "native", plans.count(size).parameters)
    assert rate.tokens_per_second == pytest.approx(throughput.MARGIN * PUBLISHED[size])
    assert f"{PUBLISHED[size]:,}" in rate.source
    assert "published recipe" in rate.source


def test_a_benchmark_s_rate_serves_until_a_training_has_its_own() -> None:
    """Micro-steps alone are faster than a training, at whatever length."""
    record(plans.SPARK, KIND, "native", 2000.0, 1024, "2026-11-26T00:00:00Z", benched=True)
    rate = ask(plans.SPARK, engine="native")
    assert rate.tokens_per_second == pytest.approx(throughput.MARGIN * 2000)
    assert rate.source.startswith("benchmarked on this machine")
    record(plans.SPARK, KIND, "native", 1800.0, 4096, "2026-11-26T01:00:00Z")
    assert [one.tokens_per_second for one in lookup(plans.SPARK, KIND)] == [1800.0]
    assert ask(plans.SPARK, engine="native").source.startswith("measured on this machine")


def test_other_sizes_are_scaled_from_the_2b() -> None:
    rate = from_table(plans.SPARK, plans.model("2b").shape, LOAD, "native", 1_106_500_000)
    assert rate.tokens_per_second == pytest.approx(throughput.MARGIN * 2 * 3568)
    assert "scaled" in rate.source


def test_what_is_slower_than_the_recipe_is_expected_slower() -> None:
    shape, whole = plans.model("2b").shape, 2_213_000_000
    plain = from_table(plans.SPARK, shape, LOAD, "native", whole).tokens_per_second
    full = from_table(plans.SPARK, shape, replace(LOAD, mode="full"), "native", whole).tokens_per_second
    assert full == pytest.approx(plain * 3173 / 3461)
    again = from_table(plans.SPARK, shape, replace(LOAD, checkpointing=True), "native", whole).tokens_per_second
    assert 0.6 * plain < again < 0.8 * plain
    reference = from_table(plans.SPARK, shape, LOAD, "reference", whole)
    assert reference.tokens_per_second < 0.8 * plain
    assert "reference" in reference.source
    without = from_table(plans.SPARK, shape, replace(LOAD, fla=False), "reference", whole)
    assert without.tokens_per_second < 0.15 * reference.tokens_per_second


def test_a_slower_gpu_is_scaled_down_and_a_faster_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, whole = plans.model("2b").shape, 2_213_000_000
    plain = from_table(plans.SPARK, shape, LOAD, "native", whole).tokens_per_second
    for operations_there, share in ((50e12, 0.5), (790e12, 1.0)):
        monkeypatch.setattr(throughput, "probe", lambda machine, rate=operations_there: Probe(rate, 1e12))
        assert from_table(plans.H200, shape, LOAD, "native", whole).tokens_per_second == pytest.approx(share * plain)


def test_operations_of_a_token() -> None:
    """FACTS: 6.95 GFLOP with LoRA, 9.3 with full fine-tuning, where 35 % of the tokens have labels."""
    shape = plans.model("2b").shape
    load = replace(LOAD, labels=int(0.35 * LOAD.area))
    assert operations(shape, load) == pytest.approx(6.95e9, rel=0.01)
    assert operations(shape, replace(load, mode="full")) == pytest.approx(9.3e9, rel=0.01)
    again = operations(shape, replace(load, checkpointing=True)) - operations(shape, load)
    assert again == pytest.approx(2 * (shape.layer_parameters + load.trainable))


def test_a_cpu_by_its_matrix_products() -> None:
    shape = plans.model("0.8b").shape
    slow, fast = (from_probe(Probe(rate, 30e9), shape, LOAD).tokens_per_second for rate in (50e9, 200e9))
    assert slow < fast < 4 * slow
    assert fast < 200e9 / operations(shape, LOAD)
    assert "measured here" in from_probe(Probe(50e9, 30e9), shape, LOAD).source


def test_a_measurement_wins_and_the_estimate_stays_below_it() -> None:
    assert record(plans.SPARK, KIND, "reference", 1000.0, 1024, "2026-11-24T10:00:00Z")
    assert record(plans.SPARK, KIND, "reference", 1500.0, 8192, "2026-11-24T11:00:00Z")
    assert ask(plans.SPARK).tokens_per_second == pytest.approx(900)
    assert ask(plans.SPARK, length=16384).tokens_per_second == pytest.approx(1350)
    assert "measured on this machine, 2026-11-24T10" in ask(plans.SPARK).source
    for other in (ask(plans.SPARK, mode="full"), ask(plans.SPARK, engine="native")):
        assert "published" in other.source


def test_a_later_measurement_takes_the_place_of_the_earlier() -> None:
    for rate in (1000.0, 800.0):
        record(plans.SPARK, KIND, "reference", rate, 1024, "now")
    assert [m.tokens_per_second for m in lookup(plans.SPARK, KIND)] == [800.0]
    assert not lookup(plans.H200, KIND)


def test_the_notebook_is_no_mans_trouble(home: Path) -> None:
    home.mkdir()
    (home / measurements.NAME).write_text("{ broken")
    assert lookup(plans.SPARK, KIND) == []
    assert record(plans.SPARK, KIND, "reference", 1.0, 1024, "now")
    assert json.loads((home / measurements.NAME).read_text())["schema"] == 1


def test_another_schema_s_notebook_counts_as_empty(home: Path) -> None:
    record(plans.SPARK, KIND, "reference", 1.0, 1024, "now")
    path = home / measurements.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    assert lookup(plans.SPARK, KIND) == []


def test_ways_are_kept_beside_other_lengths_and_for_these_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, here = Layers("qwen3_5", 64, 96, 8), {"torch": "2.11.0", "triton": "3.6.0"}
    monkeypatch.setattr(measurements, "versions", lambda: here)
    for ways in ({"a": "torch", "b": "torch"}, {"b": "triton"}):
        keep_ways(plans.SPARK, layers, ways, "now")
    assert ways_here(plans.SPARK, layers) == {"a": "torch", "b": "triton"}
    for other in ({"torch": "2.12.0"}, {"triton": "3.7.1"}):
        monkeypatch.setattr(measurements, "versions", lambda other=other: here | other)
        assert ways_here(plans.SPARK, layers) == {}


def test_a_probe_is_of_the_fastest_call_and_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = iter([0.1])
    assert 0.002 <= measurements._best(lambda: time.sleep(next(pauses, 0.002)), "cpu") < 0.1
    monkeypatch.setattr(measurements, "_best", lambda work, device: 1.0)
    assert measurements.measure("cpu") == Probe(2 * 768**3, 2 * 4 * (1 << 24))


def test_a_folder_that_cannot_be_written_ends_no_training(home: Path) -> None:
    home.write_text("a file where the folder should be")
    assert record(plans.SPARK, KIND, "reference", 1.0, 1024, "now") is False


def test_a_cpu_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measurements.probe(plans.CPU)
    assert 1e8 < first.operations < 1e14
    assert 1e8 < first.bytes < 1e13
    monkeypatch.setattr(measurements, "measure", lambda device: pytest.fail("measured again"))
    assert measurements.probe(plans.CPU) == first
