"""`bench kernels`, `products`, `synthetic`: what is checked before it is timed, what is kept, what is said."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkctl_kernels import gemm, ways
from sparkctl_kernels.dispatch import Choice

from sparkctl.bench import kernels, products, synthetic, workload
from sparkctl.bench.setting import setting
from sparkctl.bench.subjects import Library, Sizes, Subject
from sparkctl.cli import app
from sparkctl.demo.model import config as tiny
from sparkctl.hardware import measurements
from sparkctl.hardware.machine import this_machine
from sparkctl.hardware.measurements import Layers
from sparkctl.train.engines.native import engine as native

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return Sizes.of(workload.synthetic(tiny(), "lora", 60, 3, rank=16), CPU)


def test_every_operator_is_right_and_timed(bench: Any) -> None:
    status, said = bench("kernels", "--tokens", 60, "--documents", 3, "--calls", 2)
    assert status == 0
    assert "tiny shape" in said["note"]
    assert [row["operator"] for row in said["operators"]] == list(kernels.WHERE)
    for row in said["operators"]:
        assert row["right"]
        assert 0 < row["ours"]["p20"] <= row["ours"]["p50"] <= row["ours"]["p80"]
        assert row["eager"]["p50"] > 0
        assert row["ceiling"] > 0
        assert row["library"] is None  # of a GPU


def test_a_wrong_operator_fails_and_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparkctl_kernels.silu_mul import op

    real = op.forward

    def wrong(gate_up: torch.Tensor, y: torch.Tensor) -> None:
        real(gate_up, y)
        y.mul_(1.01)

    monkeypatch.setattr(op, "forward", wrong)
    status, said = bench("kernels", "--tokens", 60, "--documents", 3, "--operators", "silu_mul,rms_norm", "--calls", 1)
    assert (status, said["ok"]) == (1, False)
    silu_mul, rms_norm = said["operators"]
    assert (silu_mul["right"], silu_mul["ours"], rms_norm["right"]) == (False, None, True)
    assert [name for name, error in silu_mul["errors"].items() if error > 1] == ["y"]


@pytest.mark.parametrize("name", kernels.WHERE)
def test_one_percent_in_any_result_is_seen(name: str, sizes: Sizes) -> None:
    """Each output and each gradient, as the check sees it; nothing planted, nothing seen."""
    torch.manual_seed(0)
    subject = made(name, sizes)
    half = {n: t if n in subject.fixed else t.bfloat16() for n, t in subject.inputs().items()}
    plain = kernels.compare(subject, half)
    assert max(plain.values()) <= 1
    for result in plain:
        errors = kernels.compare(replace(subject, ours=planted(subject, result)), half)
        assert [n for n, error in errors.items() if error > 1] == [result]


def made(name: str, sizes: Sizes) -> Subject:
    from importlib import import_module

    return getattr(import_module(f"sparkctl.bench.{kernels.WHERE[name]}"), name)(sizes)


def planted(subject: Subject, result: str) -> Any:
    """Our form of the operator with this result off by 1 %."""

    def form(inputs: dict[str, torch.Tensor]) -> Any:
        run = subject.ours(inputs)
        return lambda: {n: 1.01 * t.float() if n == result else t for n, t in run().items()}

    return form


def test_what_gives_no_number_or_raises_is_a_row(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.distance(torch.tensor([float("nan")]), torch.ones(1)) == kernels.ENDLESS
    monkeypatch.setattr(kernels, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory\nat x")))
    status, said = bench("kernels", "--operators", "rms_norm", "--tokens", 60, "--documents", 3)
    assert (status, said["operators"][0]["failed"], said["operators"][0]["right"]) == (1, "out of memory", False)


@pytest.mark.parametrize("library", [True, False])
def test_a_library_that_tunes_for_minutes_says_so_or_is_left_out(library: bool, sizes: Sizes) -> None:
    """As gated_delta on a GPU, where the library's error is the measure of ours."""
    said: list[str] = []

    class Words:
        def say(self, text: str) -> None:
            said.append(text)

    subject = made("rms_norm", sizes)
    rival = Library("a library", subject.eager, "it tunes its kernels") if library else None
    subject = replace(subject, library=rival, judged_by_library=True)
    row = kernels.measure(subject, CPU, measurements.Probe(1e12, 1e11), 1, Words())  # type: ignore[arg-type]
    assert said == (["rms_norm: it tunes its kernels"] if library else [])
    assert row.ours
    assert (row.right, row.library is None, bool(row.errors)) == (
        (True, False, True) if library else (None, True, False)
    )


@pytest.mark.parametrize(("kernel", "serves", "rival"), [
    ("flash", True, "own triton"), ("triton", True, "torch's flash"), ("triton", False, None),
])  # fmt: skip
def test_attention_s_two_kernels_are_rivals(
    kernel: str, serves: bool, rival: str | None, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparkctl_kernels.attention import flash, op

    monkeypatch.setattr(op, "choice", lambda *_: Choice("attention", kernel, "as on a GPU"))
    monkeypatch.setattr(flash, "serves", lambda *_: serves)
    library = made("attention", sizes).library
    assert (library and library.name) == rival


def test_what_nobody_checked_is_neither_right_nor_wrong(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = kernels.measure
    monkeypatch.setattr(
        kernels, "measure", lambda subject, *rest: real(replace(subject, judged_by_library=True), *rest)
    )
    line = ("kernels", "--operators", "rms_norm", "--tokens", 60, "--documents", 3, "--calls", 1, "--no-library")
    status, said = bench(*line)
    assert (status, said["ok"], said["operators"][0]["right"]) == (0, True, None)
    assert app.run(["bench", *map(str, line)]) == 0
    assert f"rms_norm: {kernels.UNCHECKED}" in capsys.readouterr().out


def test_a_dense_model_has_fewer_operators(bench: Any, llama_folder: Path) -> None:
    arguments = ("--model", llama_folder, "--tokens", 40, "--documents", 2, "--calls", 1)
    status, said = bench("kernels", *arguments)
    assert status == 0
    assert {row["operator"] for row in said["operators"]} == set(kernels.WHERE) - set(kernels.HYBRID)
    assert bench("kernels", *arguments, "--operators", "gated_norm")[0] == 2


def test_a_cpu_has_nothing_to_choose_among_products(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = bench("products", "--tokens", 64)
    assert (status, said["products"], said["kept"]) == (0, [], False)
    assert app.run(["bench", "products", "--tokens", "64"]) == 0
    assert "nothing to choose from" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["lora", "mtp"])
def test_products_of_as_few_tokens_as_can_be_asked_for(bench: Any, mode: str) -> None:
    assert bench("products", "--tokens", 16, "--mode", mode)[0] == 0


def test_products_of_a_step_are_measured_kept_and_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, with a clock of the test, to which halves take half of torch's time."""
    monkeypatch.setattr(gemm, "fused", lambda _: True)
    monkeypatch.setattr(ways, "WAYS", {name: ways.WAYS[name] for name in ("torch", "halves")})
    at = setting(shape="qwen3.5-2b", mode="lora", pack=64, documents=2)
    seconds = cycle([1.0, 0.5])
    rows, layers = products.measure(products.one_of_each(at.work), CPU, lambda _: next(seconds))
    kinds = {row.name.split(" ")[1] for row in rows}
    assert kinds == {"nt", "nn", "nn+", "tn"}
    assert all(row.timed.best == "halves" and row.speedup == 2 for row in rows)
    assert layers == Layers("qwen3_5", at.work.text["hidden_size"], at.work.text["intermediate_size"], at.work.rank)
    monkeypatch.setattr(products, "measure", lambda *_, **__: (rows, layers))
    gpu = replace(at, machine=at.machine.model_copy(update={"device": "cuda"}))
    assert products.bench_products(gpu) == (rows, True)
    found = measurements.ways_here(gpu.machine, layers)
    assert found == {row.name: "halves" for row in rows}
    from sparkctl.cli import console, measured

    console.answer({}, measured.products_table(at, rows, True), json=False)
    assert "trainings that start on this machine take the best of each" in capsys.readouterr().out


def test_ways_are_those_of_the_machine_the_layers_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, layers = this_machine(), Layers("qwen3_5", 8, 16, 4)
    assert measurements.keep_ways(machine, layers, {"gemm nt 1x2x3": "halves", "gemm nn 1x2x3": "matmul"}, "now")
    assert measurements.keep_ways(machine, layers, {"gemm nn 1x2x3": "torch"}, "now")
    kept = {"gemm nt 1x2x3": "halves", "gemm nn 1x2x3": "torch"}
    assert measurements.ways_here(machine, layers) == kept
    assert measurements.ways_here(machine, layers._replace(rank=8)) == {}
    assert measurements.ways_here(machine.model_copy(update={"name": "another"}), layers) == {}
    monkeypatch.setattr(measurements, "versions", lambda: {"torch": "9"})
    assert measurements.ways_here(machine, layers) == {}
    config = type("Config", (), dict(model_type="qwen3_5_text", hidden_size=8, intermediate_size=16))
    monkeypatch.undo()
    assert Layers.of(config, 4) == layers


def test_a_training_takes_what_was_kept_and_a_resumed_one_what_it_began_with() -> None:
    config = type("Config", (), dict(model_type="qwen3", hidden_size=8, intermediate_size=16))
    measurements.keep_ways(this_machine(), Layers("qwen3", 8, 16, 0), {"gemm nt 1x2x3": "halves"}, "now")
    native.pin_start({}, Layers.of(config))
    assert ways.pinned() == {"gemm nt 1x2x3": "halves"}
    native.pin_start({"device": "a GPU", "gemm nn 1x2x3": "halves"}, Layers.of(config))
    assert ways.pinned() == {"gemm nn 1x2x3": "halves"}
    native.pin_start({"device": "a GPU"}, Layers.of(config))
    assert ways.pinned() == {}


def test_the_dense_model_has_28_layers_and_says_what_was_published(bench: Any) -> None:
    status, said = bench("synthetic", "--stacks", "native", "--steps", 1, "--pack", 32, "--documents", 2)
    assert status == 0
    assert said["published"] == 4.8
    assert said["stacks"][0]["tokens_per_second"] > 0
    assert "tiny shape" in said["note"]
    at = synthetic.synthetic_setting("full", 5376)
    assert (at.work.text["num_hidden_layers"], at.work.mode) == (28, "full")
    assert bench("synthetic", "--pack", 16, "--documents", 9)[0] == 2


def test_the_dense_model_is_as_large_as_the_2b_without_a_vocabulary() -> None:
    from sparkctl.bench.setting import text_parameters

    config = {**synthetic.CONFIG, "num_hidden_layers": synthetic.LAYERS}
    embedding = config["vocab_size"] * config["hidden_size"]
    assert text_parameters(config) - embedding == pytest.approx(1.41e9, rel=0.01)
    assert workload.synthetic(config, "lora", 5376, 12).tokens == 5376


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(600)  # libraries tune and compile
def test_on_a_gpu_every_operator_is_right_and_every_product_has_its_ways(bench: Any) -> None:
    status, said = bench("kernels", "--shape", "qwen3.5-0.8b", "--tokens", 1283, "--documents", 5, "--calls", 3)
    wrong = {row["operator"]: row["failed"] or row["errors"] for row in said["operators"] if not row["right"]}
    assert (status, wrong) == (0, {})
    assert all(row["ours"]["busy"] > 0 and row["share"] > 0 for row in said["operators"])
    for mode in ("lora", "full", "mtp"):
        status, said = bench("products", "--shape", "qwen3.5-0.8b", "--tokens", 640, "--mode", mode, "--no-keep")
        assert status == 0
        assert {way for row in said["products"] for way in row["timed"]["seconds"]} == set(ways.WAYS)
        assert [row["name"] for row in said["products"] if row["timed"]["wrong"]] == []


def test_a_kernels_share_of_the_ceiling_is_by_its_busy_time() -> None:
    timed = kernels.Timing(p20=3.0, p50=4.0, p80=5.0, busy=2.0)
    row = kernels.Row("rms_norm", "triton", {}, timed, timed, ceiling=1.0)
    assert row.share == 0.5
    assert replace(row, ours=replace(timed, busy=None)).share == 0.25  # where no GPU counts it
    assert replace(row, ours=None).share is None
