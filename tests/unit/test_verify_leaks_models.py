"""The models that leaks are looked for in: the real one's head dims, every form of attention that its layers use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkctl_kernels.attention import reference as attention_reference
from sparkctl_kernels.documents import Documents

from sparkctl.hardware.machine import this_machine
from sparkctl.model import catalog
from sparkctl.progress import silent
from sparkctl.verify import operators
from sparkctl.verify.leaks import Finding, engine_leaks
from sparkctl.verify.small import WINDOW, parts_of, whole_config, windows, write_model

CPU = torch.device("cpu")
FULL, WINDOWED = "full_attention", "sliding_attention"


def config(family: str, **values: Any) -> dict[str, Any]:
    """A config.json that leaves to its type what it can."""
    return dict(model_type=family, hidden_size=896, num_attention_heads=14, num_hidden_layers=24, **values)


PUBLISHED = config("qwen2", sliding_window=131072, use_sliding_window=False, max_window_layers=21)
MIXED = config("qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=21)
HYBRID = catalog.config("qwen3.5-0.8b")
TEXT = HYBRID["text_config"]


@contextmanager
def leaking(windowed: bool) -> Iterator[None]:
    """Attention with a window, or the one without, takes the whole pack for one document."""
    real = attention_reference.attention

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Any, window: int | None = None) -> Any:
        return real(q, k, v, [len(q)] if (window is not None) == windowed else lengths, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_reference, "attention", call)
        yield


@pytest.mark.parametrize("windowed", [True, False])
def test_a_leak_in_one_form_of_attention_is_found_in_operator_and_engine(windowed: bool) -> None:
    with leaking(windowed):
        alone = operators.operator_leaks(MIXED, CPU)
        engine = engine_leaks(MIXED, "native", "lora", this_machine(), silent)
    assert [(one.part, one.leaks) for one in alone] == [("attention", not windowed), ("windowed attention", windowed)]
    assert [(one.part, one.leaks) for one in engine] == [("attention", True)]
    assert engine[0].leak > 0.01  # observed: 0.2 and more


def test_every_form_is_tight_and_a_leak_would_be_seen() -> None:
    found = [*operators.operator_leaks(MIXED, CPU), *engine_leaks(MIXED, "native", "lora", this_machine(), silent)]
    assert [one.leak for one in found] == [0, 0, 0]
    assert all(one.planted and one.planted > 0.01 for one in found)


@pytest.mark.parametrize(
    ("source", "forms"),
    [
        (PUBLISHED, [None]),
        (MIXED, [None, WINDOW]),
        (MIXED | dict(max_window_layers=0), [WINDOW]),
        (MIXED | dict(max_window_layers=24), [None]),
        (config("qwen3", layer_types=[WINDOWED, FULL] * 12, use_sliding_window=True), [WINDOW, None]),
        (config("mistral"), [WINDOW]),  # whose type has a window of 4,096 where config.json is silent
        (config("mistral", sliding_window=None), [None]),
        (config("llama", sliding_window=4096), [None]),  # which no layer of a Llama reads
        (HYBRID, [None]),
    ],
)
def test_attention_is_tried_as_the_layers_use_it(
    source: dict[str, Any], forms: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert windows(whole_config(source)) == forms
    tried: list[int | None] = []
    real = operators._attention

    def attention(heads: int, window: int | None) -> tuple[list[tuple[int, ...]], Callable[..., Any]]:
        tried.append(window)
        return real(heads, window)

    monkeypatch.setattr(operators, "_attention", attention)
    operators.operator_leaks(source, CPU)
    assert tried == forms


@pytest.mark.parametrize(
    ("source", "dim"),
    [
        (config("qwen2"), 64),
        (config("llama"), 64),
        (config("mistral", head_dim=None), 64),
        (config("mistral", head_dim=128), 128),
        (config("qwen3"), 128),  # its type's own, which is not hidden_size / heads
        (config("olmo2"), 64),  # of no family: D / heads
        (HYBRID, 256),
        (dict(model_type="qwen3_5", text_config=TEXT | dict(head_dim=128)), 128),
    ],
)
def test_a_small_model_has_the_heads_of_the_real_one(
    source: dict[str, Any], dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    folder = write_model(tmp_path, source, "attention")
    made = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = file.get_slice("model.layers.0.self_attn.k_proj.weight").get_shape()[0]
    assert keys == made["num_key_value_heads"] * dim
    seen: list[torch.Size] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Documents, window: int | None) -> Any:
        seen.append(q.shape)
        return q

    monkeypatch.setattr("sparkctl_kernels.attention.attention", attention)
    monkeypatch.setattr(operators, "has_rule", lambda _: False)
    monkeypatch.setattr(operators, "_others", lambda call, packed, inputs: {"q": call(packed, *inputs)})
    operators.operator_leaks(source, CPU)
    assert {shape[-1] for shape in seen} == {dim}


def test_a_small_model_has_each_kind_of_layer_once(tmp_path: Path) -> None:
    def layers(name: str, source: dict[str, Any], part: str = "attention") -> tuple[list[str], int | None]:
        made = json.loads((write_model(tmp_path / name, source, part) / "config.json").read_text())
        return made["layer_types"], made.get("sliding_window")

    assert layers("mixed", MIXED) == ([FULL, WINDOWED], WINDOW)
    assert layers("published", PUBLISHED) == ([FULL, FULL], None)
    assert layers("windowed", MIXED | dict(max_window_layers=0)) == ([WINDOWED, WINDOWED], WINDOW)
    assert layers("hybrid", HYBRID, "whole model") == (["linear_attention"] * 2 + [FULL], None)


def test_a_hybrid_that_leaves_its_dims_to_its_type_is_one() -> None:
    bare = {key: value for key, value in TEXT.items() if not key.startswith("linear_")}
    assert parts_of(bare) == parts_of(HYBRID)
    assert [one.part for one in operators.operator_leaks(bare, CPU)] == ["attention", "convolution", "recurrence"]


def test_operators_that_a_gpu_lacks_are_named_instead_of_run() -> None:
    narrow = config("llama", head_dim=96)
    gpu = torch.device("cuda")  # which is not here: nothing may be computed
    why = "there is nothing for attention heads of 96 dims on a GPU, which takes powers of two from 16 to 256"
    assert operators.operator_leaks(narrow, gpu) == [Finding("operator", "attention", refused=why)]
    assert [one.failed for one in operators.operator_leaks(narrow, CPU)] == [False]
    halved = operators.operator_leaks(TEXT | dict(linear_key_head_dim=96), gpu)
    assert [one.part for one in halved if one.refused] == ["attention", "convolution", "recurrence"]
