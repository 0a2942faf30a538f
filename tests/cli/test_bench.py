"""`sparkctl bench`: stacks in processes of their own, one that fails as a row, a prediction that says it is one."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plans
import pytest
import ready
import tiny
from safetensors.torch import load_file, save_file

from sparkctl.bench import clock, heads, predict, setting, stacks, step, worker, workload
from sparkctl.bench.worker import Measured
from sparkctl.cli import app, bench_options, timings
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.store import Run


def test_two_stacks_compute_the_same_on_a_tiny_shape(bench: Any) -> None:
    status, said = bench("step", "--stacks", "peft-fla,native", "--steps", 2, "--pack", 64, "--documents", 2)
    assert status == 0
    assert "tiny shape" in said["note"]
    rival, native = said["stacks"]
    assert rival["ratio"] == 1
    assert native["tokens_per_second"] == pytest.approx(64 / native["measured"]["p50"])
    assert native["measured"]["trainable"] == rival["measured"]["trainable"] > 0
    assert native["measured"]["head_rows"] == said["labels"] < rival["measured"]["head_rows"] == 64
    # the rival sees one document: near, not equal
    assert native["measured"]["loss"] == pytest.approx(rival["measured"]["loss"], rel=0.02)
    assert 0 < native["share"] < 1
    assert native["measured"]["p20"] < native["measured"]["p80"]  # of two calls the faster and the slower
    assert native["measured"]["first_step"] > 1


def test_a_stack_that_fails_is_a_row(bench: Any) -> None:
    status, said = bench("step", "--stacks", "unsloth", "--steps", 1, "--pack", 32, "--documents", 1)
    assert (status, said["ok"]) == (1, False)
    assert said["stacks"][0]["failed"] == "stack `unsloth` failed: unsloth is not installed"


def test_a_step_whose_loss_is_no_number_is_not_timed(bench: Any, tmp_path: Path, llama_folder: Path) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    broken = {name: tensor.fill_(math.nan) if "norm" in name else tensor for name, tensor in weights.items()}
    shutil.copytree(llama_folder, tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    status, said = bench("step", "--model", tmp_path / "broken", "--stacks", "native", "--pack", 32, "--documents", 1)
    assert (status, said["stacks"][0]["kept"]) == (1, False)
    assert said["stacks"][0]["failed"] == "stack `native` failed: the loss of its first step is nan"


def test_a_stack_is_not_measured_without_what_it_is_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take plain torch and say nothing."""
    monkeypatch.setattr(stacks, "find_spec", lambda name: None)
    with pytest.raises(SparkError, match="flash-linear-attention is not installed"):
        stacks.peft_fla(workload.Workload({}, "lora", (32,), (16,)), None)


def test_a_hub_id_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", "step", "--model", "Qwen/X"]) == 2
    said = capsys.readouterr().err
    assert "error: no folder `Qwen/X`" in said
    assert "hint: name a folder with config.json and safetensors weights\n" in said


@pytest.mark.parametrize("part", ["step", "kernels", "products", "mtp"])
@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("olmo2", {}, "the model type `olmo2`"),
        ("llama", {"hidden_act": "gelu"}, "the activation `gelu`"),  # it would be timed with SiLU
    ],
)
def test_a_model_that_the_native_engine_does_not_compute_is_named(
    bench: Any, tmp_path: Path, part: str, family: str, changes: dict[str, str], what: str
) -> None:
    status, said = bench(part, "--model", tiny.dense(tmp_path, family, **changes))
    assert (status, said["exit_status"]) == (2, 2)
    assert said["error"].startswith(f"there is nothing to measure for {what}")
    assert "`--shape`" in said["hint"]


def test_the_help_names_every_stack() -> None:
    assert bench_options.STACKS.replace(" and ", ", ").split(", ") == list(stacks.STACKS)


def test_what_is_not_installed_is_not_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "COMPARED", {"stock": None, "unsloth": "no_such_package", "native": "torch"})
    assert step.installed() == (["stock", "native"], ["unsloth"])


def test_lengths_come_from_a_run(bench: Any, tmp_path: Path, llama_folder: Path) -> None:
    run = ready.run(tmp_path / "r1", llama_folder, count=12)
    arguments = ("--stacks", "native", "--steps", 1, "--pack", 64)
    status, said = bench("step", *arguments, "--run", run.root, "--model", llama_folder)
    assert status == 0
    assert 0 < sum(said["lengths"]) <= 64
    assert said["shape"] == llama_folder.name


def test_a_pack_of_a_run_is_its_fullest(tmp_path: Path, llama_folder: Path) -> None:
    """Packs lie in random order, and one holds what was left."""
    made = [(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool)) for length in (15, 15, 15, 15, 1)]
    run = Run.create(tmp_path / "run")
    ready.store(run.root / "tokens", made, held_out=np.zeros(5, dtype=bool))
    for pack, lengths in ((46, [1, 15, 15, 15]), (45, [15, 15, 15]), (20, [1, 15])):
        taken = setting.setting(mode="lora", pack=pack, model=llama_folder, run=run.root).work
        assert sorted(taken.lengths) == lengths
        assert sum(taken.labels) == sum(length - 1 for length in lengths)


def test_a_model_folder_is_computed_with_its_weights(bench: Any, tmp_path: Path, llama_folder: Path) -> None:
    """A norm 30 times as large makes other logits; without weights random ones stand in, which is said."""
    arguments = ("step", "--stacks", "peft-fla,native", "--steps", 1, "--pack", 64, "--documents", 1, "--model")
    changed, bare = tmp_path / "changed", tmp_path / "bare"
    shutil.copytree(llama_folder, changed)
    bare.mkdir()
    shutil.copy(llama_folder / "config.json", bare)
    tensors = load_file(changed / "model.safetensors")
    save_file(tensors | {"model.norm.weight": 30 * tensors["model.norm.weight"]}, changed / "model.safetensors")
    said = {folder: bench(*arguments, folder)[1] for folder in (llama_folder, changed, bare)}
    losses = {folder: [stack["measured"]["loss"] for stack in answer["stacks"]] for folder, answer in said.items()}
    for folder in losses:
        assert losses[folder][1] == pytest.approx(losses[folder][0], rel=0.02)
    assert losses[changed][0] > 1.5 * losses[llama_folder][0]
    assert [answer["note"] for answer in said.values()] == [None, None, f"`{bare}` has no weights: random ones"]


def test_on_a_gpu_a_run_brings_its_model(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.dense(tmp_path / "heads-of-16", head_dim=16)
    run = ready.run(tmp_path / "r1", model, count=12)
    here = setting.this_machine()
    for device, name in (("cuda", model.name), ("cpu", "the demo's tiny shape")):
        monkeypatch.setattr(setting, "this_machine", lambda device=device: here.model_copy(update={"device": device}))
        at = setting.setting(mode="lora", pack=64, run=run.root)
        assert at.name == name
        assert (at.work.checkpoint is not None) == (device == "cuda")
    monkeypatch.setattr(setting, "this_machine", lambda: here.model_copy(update={"device": "cuda"}))
    assert setting.setting(mode="lora", pack=64, run=run.root, shape="qwen3.5-4b").name == "qwen3.5-4b"
    with pytest.raises(UsageError, match="nothing to measure for attention heads of 8 dims on a GPU"):
        setting.setting(mode="lora", pack=64, model=llama_folder)


def test_what_is_kept_for_plans_is_said(bench: Any, capsys: pytest.CaptureFixture[str], llama_folder: Path) -> None:
    arguments = ["step", "--stacks", "native", "--pack", "64", "--documents", "2", "--steps"]
    assert bench(*arguments, 5)[1]["stacks"][0]["kept"] is False  # a shape is no model's
    assert bench(*arguments, 1, "--model", llama_folder)[1]["stacks"][0]["kept"] is False  # too few
    capsys.readouterr()
    assert app.run(["bench", *arguments, "5", "--model", str(llama_folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"plans of {llama_folder.name} on this machine expect native's rate from now on" in said


HELP = "sparkctl bench step --help"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("step", "--stacks", "fastest"), "no stack `fastest`; there are stock, peft-fla, unsloth", HELP),
        (("step", "--stacks", ""), "no stack is named; there are stock", HELP),
        (("synthetic", "--stacks", ","), "no stack is named; there are stock", HELP),
        (("mtp", "--stacks", ","), "no stack is named; there are transformers", "sparkctl bench mtp --help"),
        (
            ("step", "--documents", 9, "--pack=16", "--mode", "full"),
            "9 documents of two tokens and more do not fit",
            "sparkctl bench step --pack=16 --mode full --json --documents 8",
        ),
        (
            ("predict", "--device", "x", "--mode", "full"),
            "no device `x`; there are gb10",
            "sparkctl bench predict --mode full --json --device gb10",
        ),
        (
            ("predict", "--shape=a b", "--pack", 64),
            "no shape `a b`; there are qwen3.5-0.8b",
            "sparkctl bench predict --pack 64 --json --shape qwen3.5-2b",
        ),
        (
            ("kernels", "--operators", "rms_norm,x,attention", "--tokens", 64),
            "has no operator `x`; it has rms_norm",
            "sparkctl bench kernels --tokens 64 --json --operators rms_norm,attention",
        ),
        (("kernels", "--operators=x"), "has no operator `x`; it has rms_norm", "sparkctl bench kernels --json"),
    ],
)
def test_wrong_usage(bench: Any, arguments: tuple[object, ...], error: str, hint: str) -> None:
    status, said = bench(*arguments)
    assert status == 2
    assert error in said["error"]
    assert said["hint"] == hint


def test_a_prediction_says_so_and_bounds_what_was_measured(bench: Any) -> None:
    said = bench("predict", "--device", "gb10")[1]
    assert said["prediction"] is True
    assert said["seconds"] == pytest.approx(sum(part["seconds"] for part in said["parts"]))
    # docs/performance.md, the least that was seen on an H200: 81.9 ms GPU-busy with LoRA, 106.8 in full fine-tuning
    assert 0.65 * 81.9e-3 < predict.predict("h200", "qwen3.5-2b", "lora", 5376, 12).seconds < 81.9e-3
    assert 0.65 * 106.8e-3 < predict.predict("h200", "qwen3.5-2b", "full", 5376, 12).seconds < 106.8e-3
    longer = predict.predict("gb10", "qwen3.5-2b", "lora", 5376, 12, checkpointing=True)
    plain = predict.predict("gb10", "qwen3.5-2b", "lora", 5376, 12)
    assert longer.seconds > 1.2 * plain.seconds
    again = {part.name: part.operations + part.bytes for part in longer.parts}
    grown = {part.name for part in plain.parts if again[part.name] > part.operations + part.bytes}
    assert grown == set(again) - {"lm_head and cross-entropy"}


def test_a_prediction_says_whether_a_training_fits(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By the memory model: the 2B's peak on an H200 is one of those that were measured, 15.70 GiB."""
    known = predict.predict("h200", "qwen3.5-2b", "lora", 5376, 12)
    assert known.peak_memory / 2**30 == pytest.approx(15.70, rel=0.05)
    said = bench("predict", "--device", "gb10", "--shape", "qwen3.5-27b", "--mode", "full")[1]
    assert said["fits"] is False
    assert said["peak_memory"] > 16 * 26e9 > said["memory"]  # fp32 masters, gradients and moments alone
    assert app.run(["bench", "predict", "--shape", "qwen3.5-27b", "--mode", "full"]) == 0
    assert "a training does not fit: it takes " in capsys.readouterr().out
    assert app.run(["bench", "predict"]) == 0
    assert " GiB of 119.2 GiB" in capsys.readouterr().out


def test_documents_fill_the_pack_to_the_token() -> None:
    for total, count in ((5376, 12), (5376, 40), (5376, 1), (64, 32)):
        lengths = workload.spread(total, count)
        assert (sum(lengths), len(lengths), min(lengths) >= 2) == (total, count, True)


def test_documents_of_two_tokens_have_a_label_each(bench: Any) -> None:
    status, said = bench("step", "--stacks", "native", "--steps", 1, "--pack", 16, "--documents", 8)
    assert (status, said["lengths"], said["labels"]) == (0, [2] * 8, 8)


def test_overlapping_intervals_count_once() -> None:
    assert clock.union([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert clock.union([]) == 0
    times = clock.Times([3.0, 1.0, 2.0, 5.0, 4.0])
    assert [times.percentile(p) for p in (0, 20, 50, 80, 100)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_slow_calls_are_the_low_speeds() -> None:
    row = step.Row("native", 8, Measured("native", 1.0, 1, 1, False, {}, 0.0, p20=1.0, p50=2.0, p80=4.0))
    assert [row.rate(p) for p in (20, 50, 80)] == [2.0, 4.0, 8.0]


def test_a_cold_start_has_empty_caches_and_the_measured_one_has_them_full(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, set[str], bool]] = []

    def measure(name: str, work: Any, device: str, steps: int, variables: dict[str, str]) -> Measured:
        folders = [Path(folder) for folder in variables.values()]
        seen.append((steps, set(variables), any(folder.exists() for folder in folders)))
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return Measured(name, 30.0 - steps, 1, 1, False, {}, 0.0)

    monkeypatch.setattr(step, "_measure", measure)
    monkeypatch.setattr(step, "operations_of", lambda *_: 0.0)
    at = setting.Setting("a shape", workload.Workload({}, "lora", (8,), (4,)), 1, ready.plan().machine)
    cold, warm = (next(iter(step.bench_step(at, ["native"], steps=20, cold=cold))) for cold in (True, False))
    caches = set(step.CACHES)
    assert seen == [(0, caches, False), (20, caches, True), (20, set(), False)]
    assert (cold.cold, warm.cold) == (30.0, None)


def test_operations_are_those_that_a_stack_does() -> None:
    work, shape = workload.synthetic(plans.config("2b"), "lora", 64, 2), plans.model("2b").shape
    made = Measured("native", 1.0, 1000, 20, False, {}, 0.0, p20=1.0, p50=2.0, p80=3.0, gemm_rate=10.0)

    def more(**changes: Any) -> float:
        found, plain = (step.operations_of(one, work, shape.parameters) for one in (replace(made, **changes), made))
        return found - plain

    assert more(head_rows=21) == pytest.approx(4 * shape.head_parameters)
    assert more(trainable=1001) == pytest.approx(64 * 6)
    assert more(checkpointing=True) == pytest.approx(64 * 2 * (shape.layer_parameters + 1000))
    assert step.Row("native", 64, made, operations=10.0).share == 0.5


def test_a_stack_is_warm_when_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    stack = SimpleNamespace(
        step=lambda: done.append(1) or 2.0, trainable=1, head_rows=1, checkpointing=False, choices={}, summed=1
    )
    monkeypatch.setattr(heads, "stacks_of", lambda work: {"native": lambda work, device: stack})
    monkeypatch.setattr(worker.clock, "in_a_row", lambda work, device, count: done.append(-count) or clock.Times([0.5]))
    found = worker.measure("native", workload.Workload({}, "lora", (8,), (4,)), "cpu", 5)
    assert done[:5] == [1, 1, 1, 1, -5]  # the first step, three more, then those that are timed
    assert found.gemm_rate == 2 * 768**3 / 0.5


def test_a_prediction_is_the_roofline_of_its_parts() -> None:
    work, shape = workload.synthetic(plans.config("2b"), "lora", 4000, 2), plans.model("2b").shape
    assert sum(work.labels) == pytest.approx(0.35 * 4000, abs=2)
    parts = {part.name: part for part in predict.parts(work, shape.parameters, 1000)}
    square = sum(length**2 for length in work.lengths) / 2  # half a square of scores for each document, 14 a score
    assert parts["attention"].operations == 14 * square * shape.queries * shape.attention_layers
    assert parts["lm_head and cross-entropy"].operations == 4 * sum(work.labels) * shape.head_parameters
    spark = predict.device("gb10")
    assert (spark.bytes, spark.operations) == (273e9, 100e12)
    for operations, size, seconds in ((9e13, 1.0, 1.0), (1.0, 273e9, 1.0), (9e13, 546e9, 2.0)):
        assert predict.Part("", operations, size).seconds(spark) == pytest.approx(seconds)


def test_ratios_are_those_of_the_first_stack() -> None:
    work, machine = workload.Workload({}, "lora", (8,), (4,)), ready.plan().machine
    at = setting.Setting("a shape", work, 1, machine)
    measured = (Measured(name, 1.0, 1, 1, False, {}, 0.0, p20=s, p50=s, p80=s) for name, s in (("a", 3.0), ("b", 2.0)))
    rows = [step.Row(one.stack, 8, one) for one in measured]
    assert [stack["ratio"] for stack in timings.step_json(at, rows)["stacks"]] == [1.0, 1.5]
    table = timings.step_table(at, rows).renderables[0].renderables[-1]
    ratios = next(column for column in table.columns if column.header == "ratio")
    assert [str(cell) for cell in ratios.cells] == ["1.00", "1.50"]
