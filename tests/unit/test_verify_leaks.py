"""Leaks: each operator and engine is tight, one that does not reset is seen, and a blind check is no proof."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ready
import tiny
import torch
from fake_machine import package
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.attention import reference as attention_reference
from sparkctl_kernels.causal_conv import op as causal_conv
from sparkctl_kernels.causal_conv import reference as causal_conv_reference
from sparkctl_kernels.documents import documents
from sparkctl_kernels.gated_delta import op as gated_delta
from sparkctl_kernels.gated_delta import reference as gated_delta_reference

from sparkctl.data.batches import Pack
from sparkctl.errors import SparkError, UsageError
from sparkctl.hardware.machine import this_machine
from sparkctl.model import catalog
from sparkctl.progress import silent
from sparkctl.steps.leaks_process import leaks_apart
from sparkctl.steps.verify_leaks import Looked, verify_leaks
from sparkctl.train.engines.native.engine import NativeEngine
from sparkctl.verify import leaks
from sparkctl.verify.leaks import LENGTHS, Finding, difference, engine_leaks, three_documents
from sparkctl.verify.operators import operator_leaks
from sparkctl.verify.small import PARTS, WINDOW, parts_of, write_model
from sparkctl.verify.stack import CALLS, stack_leaks

CPU = torch.device("cpu")
QWEN = catalog.config("qwen3.5-0.8b")
LLAMA: dict[str, Any] = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-5,
)  # fmt: skip


@contextmanager
def unbounded(*parts: str) -> Iterator[None]:
    """The references of these operators take the whole pack for one document."""
    owners = {
        "attention": (attention_reference, "attention", 3),
        "convolution": (causal_conv_reference, "causal_conv", 2),
        "recurrence": (gated_delta_reference, "gated_delta", 7),
    }

    def without(real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            changed = list(arguments)
            lengths = [len(arguments[0])]
            changed[at] = documents(lengths, CPU).positions if at == 2 else lengths
            return real(*changed, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for part in parts:
            module, name, at = owners[part]
            patch.setattr(module, name, without(getattr(module, name), at))
        yield


def test_the_operators_share_the_patched_functions() -> None:
    """What `unbounded` replaces is what the operators call."""
    assert (attention.reference, causal_conv.reference, gated_delta.reference) == (
        attention_reference, causal_conv_reference, gated_delta_reference,
    )  # fmt: skip


def test_each_operator_is_tight_and_a_leak_would_be_seen() -> None:
    found = operator_leaks(QWEN, CPU)
    assert [one.part for one in found] == list(PARTS[:3])
    assert [one.leak for one in found] == [0, 0, 0]
    assert all(one.planted and one.planted > 0.01 for one in found)  # observed: 0.14 to 0.74
    assert not any(one.failed for one in found)


@pytest.mark.parametrize("part", PARTS[:3])
def test_an_operator_without_boundaries_leaks_and_is_named(part: str) -> None:
    with unbounded(part):
        found = operator_leaks(QWEN, CPU)
    assert [one.part for one in found if one.failed] == [part]
    assert [one.part for one in found if one.leaks] == [part]


@pytest.mark.parametrize("where", [slice(LENGTHS[0]), slice(-LENGTHS[2], None)], ids=["first", "last"])
@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_leak_into_one_document_alone_is_seen(where: slice, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward or of backward alone, from the changed document into the one before it or behind it."""
    real, between = attention_reference.attention, slice(LENGTHS[0], -LENGTHS[2])

    def leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        out, other, own = real(q, k, v, *rest), v[between].mean().detach(), v[where].sum()
        added = torch.zeros_like(out)
        if what == "output":
            added[where] = other
        else:
            added[between] = other * (own - own.detach())  # 0, but for its gradient
        return out + added

    monkeypatch.setattr(attention_reference, "attention", leaking)
    assert [one.part for one in operator_leaks(QWEN, CPU) if one.leaks] == ["attention"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_native_engine_is_tight(mode: Any) -> None:
    found = engine_leaks(QWEN, "native", mode, this_machine(), silent)
    assert [one.part for one in found] == list(PARTS)
    assert [(one.leak, one.noise, one.failed) for one in found] == [(0, 0, False)] * 4
    assert all(one.planted and one.planted > 0.01 for one in found)  # observed: 0.2 to 1.3


def test_an_engine_whose_operators_leak_is_named_part_by_part() -> None:
    for part in PARTS[:3]:
        with unbounded(part):
            found = engine_leaks(QWEN, "native", "lora", this_machine(), silent)
        assert [one.part for one in found if one.failed] == [part, "whole model"]
        assert [(one.leaks, one.noise) for one in found if one.failed] == [(True, 0)] * 2  # and not for being blind
        assert max(one.leak for one in found) > 0.01


def test_a_leak_in_evaluation_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativeEngine.eval_sum

    def leaking(self: NativeEngine, pack: Pack) -> torch.Tensor:
        return real(self, pack) + int(pack.documents[len(pack.documents) // 2].ids[-1])

    monkeypatch.setattr(NativeEngine, "eval_sum", leaking)
    assert [one.leaks for one in engine_leaks(LLAMA, "native", "lora", this_machine(), silent)] == [True]


def test_the_reference_is_tight() -> None:
    found = engine_leaks(LLAMA, "reference", "lora", this_machine(), silent)
    assert [(one.part, one.leak, one.failed) for one in found] == [("attention", 0, False)]


def test_transformers_called_in_three_ways() -> None:
    found = {(one.subject.partition(", ")[2], one.part): one for one in stack_leaks(QWEN, CPU)}
    assert {call for call, _ in found} == set(CALLS)
    assert not any(one.failed or one.judged for one in found.values())
    positions, lengths, right = CALLS
    assert not found[positions, "attention"].leaks
    assert not found[right, "attention"].leaks
    # plain torch, which a CPU runs, has no boundaries in convolution and recurrence whatever it is told
    assert all(found[call, part].leaks for call in CALLS for part in PARTS[1:])
    assert found[lengths, "whole model"].leak > 0.01


def test_what_transformers_refuses_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def forward(*_: object, **__: object) -> None:
        raise ValueError("cu_seqlens are not supported here\nmore")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert {one.refused for one in stack_leaks(LLAMA, CPU)} == {"cu_seqlens are not supported here"}


def test_what_fails_the_check() -> None:
    tight = Finding("an engine", "attention", planted=0.3)
    assert not tight.failed
    assert replace(tight, leak=1e-9).failed  # a bit is a leak
    assert not replace(tight, leak=1e-6, noise=2e-7).failed  # but where the engine doesn't repeat itself
    assert replace(tight, leak=1e-6, noise=9e-8).failed
    assert replace(tight, planted=0.0).failed  # blind
    assert replace(tight, planted=1e-3, noise=1e-4).failed
    assert replace(tight, leak=float("nan")).failed
    assert not replace(tight, leak=0.5, planted=None, judged=False).failed
    assert not replace(tight, leak=0.5, refused="not here").failed


def test_small_models_keep_the_heads_and_can_leak_in_one_place(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = json.loads((write_model(tmp_path / "r", QWEN, "recurrence") / "config.json").read_text())
    assert config["head_dim"] == 256
    assert config["linear_key_head_dim"] == config["linear_value_head_dim"] == 128
    assert config["layer_types"] == ["linear_attention"] * 2
    tensors = load_file(tmp_path / "r" / "model.safetensors")
    rate = next(value for name, value in tensors.items() if name.endswith("A_log"))
    taps = next(value for name, value in tensors.items() if name.endswith("conv1d.weight"))
    assert rate.float().exp().mean() == pytest.approx(0.05, rel=0.01)
    assert taps[..., :-1].abs().max() == 0
    assert taps[..., -1].min() == 1
    assert parts_of(LLAMA) == ("attention",)
    assert parts_of(QWEN) == PARTS


def test_a_type_that_cannot_be_made_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no small model of type `nothing`"):
        write_model(tmp_path, dict(model_type="nothing", hidden_size=1), "attention")


def test_every_family_has_a_small_model(tmp_path: Path) -> None:
    for family, changes in (("mistral", dict(sliding_window=4096)), ("qwen2", {}), ("qwen3", dict(head_dim=128))):
        source = json.loads((tiny.dense(tmp_path / family, family, **changes) / "config.json").read_text())
        found = engine_leaks(source, "native", "lora", this_machine(), silent)
        assert [(one.part, one.failed) for one in found] == [("attention", False)]


STAND_IN = """
import sys
from pathlib import Path
Path(__file__).with_name("seen").write_text(str("transformers" in sys.modules))
FastLanguageModel = None
"""


def test_unsloth_is_imported_before_transformers_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "unsloth", "2026.10.9", STAND_IN)
    package(tmp_path, "unsloth_zoo", "2026.10.9")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    with pytest.raises(UsageError, match="needs a GPU"):  # it gets as far as that, and says so here
        verify_leaks(None, engine="unsloth")
    assert (tmp_path / "unsloth" / "seen").read_text() == "False"
    assert "unsloth" not in sys.modules


def test_an_engine_may_be_refused_unless_trainings_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*refusing: str) -> Looked:
        def look(config: object, engine: str, *_: object, **__: object) -> list[Finding]:
            if engine in refusing:
                raise SparkError(f"{engine} is not here", "pip install it")
            return [Finding(f"{engine} engine", "attention", planted=1.0)]

        monkeypatch.setattr("sparkctl.steps.verify_leaks.engine_leaks", look)
        return verify_leaks(None)

    found = {one.subject: one.refused for one in refused("reference").findings if one.subject.endswith("engine")}
    assert found == {"reference engine": "reference is not here", "native engine": None}
    with pytest.raises(SparkError, match="native is not here"):
        refused("native")


@pytest.mark.parametrize("named", [False, True])
def test_a_hint_names_no_run_where_none_was_given(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    run = ready.run(tmp_path / "r1", llama_folder).root if named else None

    def look(*_: object, name: str, **__: object) -> list[Finding]:
        raise UsageError("it needs a GPU", f"sparkctl recommend {name} --engine native")

    monkeypatch.setattr("sparkctl.steps.verify_leaks.engine_leaks", look)
    with pytest.raises(UsageError, match="it needs a GPU") as caught:
        verify_leaks(run, engine="reference")
    mend = f"sparkctl recommend {run} --engine native" if named else "sparkctl verify leaks --engine native"
    assert caught.value.hint == mend


@pytest.mark.parametrize("named", [False, True])
def test_the_way_without_unsloth_is_the_user_s_own_command(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    run = ready.run(tmp_path / "r1", llama_folder).root if named else None
    told: list[str] = []
    monkeypatch.setattr("sparkctl.steps.verify_leaks.leaks_apart", lambda *_, without, **__: told.append(without) or [])
    verify_leaks(run, engine="unsloth", allow_slow=True)
    assert told == [f"sparkctl verify leaks {f'{run} ' if named else ''}--engine native --allow-slow"]


def test_what_another_process_finds_is_what_is_found_here() -> None:
    asked = (LLAMA, "native", "lora", this_machine(), silent)
    apart = leaks_apart(*asked, allow_slow=False, name="RUN", without="sparkctl verify leaks --engine native")
    assert apart == engine_leaks(*asked)
    assert [one.part for one in apart] == ["attention"]


def test_documents_on_both_sides_of_the_changed_one_are_trained_and_it_is_not() -> None:
    for three in three_documents():
        assert [bool(document.trained[1:].any()) for document in three] == [True, False, True]


def test_the_last_bit_is_a_difference() -> None:
    value = torch.tensor([1.0, 2.0])
    assert difference({"a": value}, {"a": value.clone()}) == 0
    assert difference({"a": value}, {"a": torch.nextafter(value, value + 1)}) > 0
    assert difference({"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([1.0, -0.0])}) > 0
    assert difference({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}) > 0
    near, none = torch.nextafter(value, value + 1), torch.tensor([1.0, math.nan])
    for order in ("ab", "ba"):  # a number that is none is seen wherever it stands
        assert difference(dict.fromkeys(order, value), {"a": near, "b": none}) == math.inf
    assert difference({"a": none}, {"a": none.clone()}) == 0


def test_adapters_are_filled_so_that_gradients_of_both_can_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(engine: NativeEngine, subject: str, part: str) -> Finding:
        seen.extend(bool(value.any()) for name, value in engine.parameters().items() if "lora_B" in name)
        return Finding(subject, part)

    monkeypatch.setattr(leaks, "engine_leak", look)
    engine_leaks(LLAMA, "native", "lora", this_machine(), silent)
    assert seen
    assert all(seen)


def test_a_sliding_window_is_felt_within_each_document() -> None:
    assert min(LENGTHS) > WINDOW
