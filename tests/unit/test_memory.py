"""The memory model: its terms, what was measured, and a real training's peak."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plans
import pytest

from sparkctl.hardware import heads, memory
from sparkctl.hardware.load import BF16, Load
from sparkctl.hardware.memory import peak, saved
from sparkctl.hardware.shape import Shape

GIB = 1 << 30
TESTS = Path(__file__).parents[1]
LORA_2B = 125_000_000  # r = 128 on the ten projections
H200 = Load("lora", LORA_2B, 128, 5376, 5376, 5376, checkpointing=False, device="cuda", fla=True)


def test_terms_make_up_the_total() -> None:
    terms = peak(plans.model("2b").shape, H200)
    assert terms.total == sum(dict(terms).values())
    assert all(value > 0 for _, value in terms)


def test_a_model_published_in_f32_stays_so() -> None:
    config = plans.config("2b")
    config["text_config"]["dtype"] = "float32"
    wide, shape = Shape.from_config(config, 1_881_825_088), plans.model("2b").shape
    assert peak(wide, H200).weights - peak(shape, H200).weights == 2 * 1_881_825_088


def test_a_head_of_its_own_is_no_layer_and_layers_without_a_list_are_counted() -> None:
    config, shape = plans.config("2b"), plans.model("2b").shape
    apart = replace(shape, tied=False, parameters=shape.parameters + shape.head_parameters)
    assert apart.layer_parameters == shape.layer_parameters
    text = config["text_config"]
    del text["layer_types"]
    text["full_attention_interval"] = 4
    assert Shape.from_config(config, shape.parameters) == shape
    assert (shape.attention_layers, shape.rule_layers) == (6, 18)


def test_full_fine_tuning_holds_18_bytes_a_parameter() -> None:
    shape = plans.model("2b").shape
    terms = peak(shape, replace(H200, mode="full", trainable=shape.parameters, rank=0))
    assert terms.weights + terms.masters + terms.gradients + terms.optimizer == 18 * shape.parameters


@pytest.mark.parametrize(
    ("load", "gib"),
    [
        (H200, 37.4),  # transformers, peft and fla, all logits
        (replace(H200, checkpointing=True), 20.9),
        (replace(H200, labels=0), 23.0),  # bf16 adapters, and the logits in chunks of 1 GB: the model leaves these out
        (replace(H200, mode="full", trainable=1_881_825_088, rank=0, labels=0), None),
    ],
)
def test_measured_on_an_h200(load: Load, gib: float | None) -> None:
    """FACTS of Qwen3.5-2B, 5,376 tokens: the model is never more than 5 % under, nor 25 % over."""
    total = peak(plans.model("2b").shape, load).total / GIB
    if gib is None:
        assert total > 37
    else:
        assert 0.95 * gib <= total <= 1.25 * gib


def test_checkpointing_saves_and_more_tokens_cost() -> None:
    shape = plans.model("4b").shape
    assert saved(shape, replace(H200, checkpointing=True)) < saved(shape, H200) / 5
    inputs = BF16 * H200.area * shape.hidden * shape.layers
    assert saved(shape, replace(H200, checkpointing=True)) > inputs + H200.area * memory.rule_bytes(shape, H200)
    assert saved(shape, replace(H200, area=2 * H200.area)) > 1.9 * saved(shape, H200)
    assert saved(shape, replace(H200, fla=False)) > 1.5 * saved(shape, H200)


NATIVE = replace(H200, labels=1900, engine="native")


@pytest.mark.parametrize(
    ("load", "gib"),
    [
        (NATIVE, 13.32),
        (replace(NATIVE, checkpointing=True), 5.97),
        (replace(NATIVE, mode="full", trainable=1_881_825_088, rank=0), 26.85),
    ],
)
def test_the_native_engine_as_measured_on_an_h200(load: Load, gib: float) -> None:
    """torch's peak over micro-steps of Qwen3.5-2B, 5,376 tokens: no moments yet, no libraries. Seen: 1.3 % under."""
    terms = peak(plans.model("2b").shape, load)
    total = (terms.total - terms.optimizer - terms.runtime) / GIB
    assert 0.97 * gib <= total <= 1.1 * gib


def test_what_was_reserved_on_an_h200_is_foretold_within_its_limits() -> None:
    """The 4B judges what was fitted to the 0.8B and the 2B. Seen: 4.3 % under to 5.3 % over."""
    script, peaks = TESTS / "real" / "memory_gpu.py", TESTS / "golden" / "peaks-h200.jsonl"
    judged = subprocess.run([sys.executable, script, "--read", peaks], capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "21 of 21 hold" in judged.stdout


def test_the_native_engine_keeps_less_on_a_gpu_and_its_head_a_chunk() -> None:
    shape = plans.model("2b").shape
    assert saved(shape, NATIVE) < saved(shape, H200) / 2
    assert peak(shape, replace(NATIVE, labels=5376)).logits == peak(shape, NATIVE).logits
    assert saved(shape, replace(NATIVE, fla=False)) > 1.5 * saved(shape, NATIVE)  # the slow reference, by a tape


@pytest.mark.parametrize(
    ("kind", "mode", "engine", "rows", "most"),
    [
        ("qwen3_5", "lora", "reference", 4, 1.4),
        ("llama", "full", "reference", 4, 1.4),
        ("qwen3_5", "lora", "native", 4, 1.4),
        ("qwen3_5", "lora", "native", 1, 1.4),  # one long document
        ("llama", "full", "native", 4, 1.4),
    ],
)
def test_a_real_training_stays_below(kind: str, mode: str, engine: str, rows: int, most: float) -> None:
    """20 to 30 M parameters, 2,048 tokens in so many documents: peak resident memory of a process of its own."""
    script = Path(__file__).parents[1] / "peak_memory.py"
    command = [sys.executable, str(script), kind, mode, engine, str(rows)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shape = Shape.from_config(measured["config"], measured["parameters"])
    load = Load(
        mode, measured["trainable"], measured["rank"], 2048, measured["longest"], measured["labels"], False, "cpu",
        engine=engine,
    )  # fmt: skip
    total = peak(shape, load).total
    least = 1.0 if engine == "native" else 0.95
    assert least * measured["peak"] <= total <= most * measured["peak"]


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_a_narrow_model_does_not_grow_with_every_pack(engine: str) -> None:
    """Forty packs of a 2-layer llama of 64 features, no two of equal lengths: 0.58 and 0.62 GB; where all compiled
    products are kept 1.58 and 1.19. The model is over (1.37 seen): this process lacks what the command imports beside.
    """
    script = Path(__file__).parents[1] / "peak_memory.py"
    command = [sys.executable, str(script), "llama", "lora", engine, "4", "", "40"]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shape = Shape.from_config(measured["config"], measured["parameters"])
    load = Load(
        "lora", measured["trainable"], measured["rank"], 2048, measured["longest"], measured["labels"], False, "cpu",
        engine=engine,
    )  # fmt: skip
    assert 0.95 * measured["peak"] <= peak(shape, load).total <= 1.45 * measured["peak"]


@pytest.mark.parametrize(("area", "rows", "widths"), [(2048, 4, {}), (2048, 1, {}), (4096, 2, {"vocab_size": 2000})])
def test_a_real_training_of_a_head_stays_below(area: int, rows: int, widths: dict[str, int]) -> None:
    """Documents of 512 and 2,048 tokens: a later step's attention keeps more of longer ones. Seen: 1.00 to 1.06."""
    script = Path(__file__).parents[1] / "head_memory.py"
    command = [sys.executable, str(script), str(area), str(rows), "3", "kl", json.dumps(widths)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shape = Shape.from_config(measured["config"], measured["parameters"])
    total = heads.peak(shape, area, measured["longest"], measured["labels"], 3, "cpu", fla=False)
    assert 0.95 * measured["peak"] <= total <= 1.3 * measured["peak"]


def test_the_memory_of_a_head_s_training() -> None:
    config = plans.config("2b")
    config["text_config"]["dtype"] = "float32"
    wide, shape = Shape.from_config(config, 1_881_825_088), plans.model("2b").shape
    load = (8192, 8192, 2867, 3, "cuda")
    assert heads.peak(wide, *load, fla=True) - heads.peak(shape, *load, fla=True) == 2 * 1_881_825_088
    states = 3 * 2867 * shape.hidden * BF16  # their gradients, which were not listed
    assert heads.kept(shape, 8192, 2867, 3, "cuda") - states == pytest.approx(1.16e9, rel=0.01)
    assert heads.scores(shape, 8192, 8192, 1) == 0  # the first step's attention is the model's own kind
