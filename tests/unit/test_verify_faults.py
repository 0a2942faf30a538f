"""One per cent wrong in any operator, forward or any gradient, and the certificate at step 0 sees it.

The table says where: trained tensors whose gradient is off in fp32 by more than the certificate allows. What no trained
tensor's gradient depends on is not seen, and needs not be: with LoRA the gradients of frozen norms, decay rates,
convolutions and gates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ready
import tiny
import torch
from faults import LINEAR, METHODS, Fault, owner_of, watched

from sparkctl.data.batches import Document, Pack
from sparkctl.data.tokens import label_count
from sparkctl.progress import silent
from sparkctl.train.engines.native import engine as native
from sparkctl.verify.certificate import Certificate
from sparkctl.verify.gradients import Truth, add_distances, fill_adapters
from sparkctl.verify.lossless import Judged, Judges, Measured, Setting, certificate, exactly, load_judge, measure

ALL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
)
QKV, MLP, RULE = ALL[:3], ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z")
RATES, NOTHING = ("A_log", "dt_bias"), ()
BIASES = tuple(f"{name}.bias" for name in ALL[:4])


# the fault; whose gradient sees it in full fine-tuning; and with LoRA, where a name means A or B of that projection
TABLE: list[tuple[Fault, tuple[str, ...], tuple[str, ...]]] = [
    (Fault("rms_norm", "forward", into="y_TD"), ALL, ALL),
    (Fault("rms_norm", "forward", of=0), ALL, ALL),
    (Fault("rms_norm", "backward_", into="d_TD"), ALL, ALL),
    (Fault("rms_norm", "backward_", into="dy_TD"), (*QKV, *MLP, *RULE, "in_proj_a", "in_proj_b"), (*QKV, *MLP, *RULE)),
    (Fault("rms_norm", "backward_", into="low_TD"), NOTHING, NOTHING),  # d itself in fp32; the operator's test sees it
    (Fault("rms_norm", "backward_", of=0), ("input_layernorm", "post_attention_layernorm", "model.norm"), NOTHING),
    (Fault("silu_mul", "forward", into="y_TF"), ALL, ALL),
    (Fault("silu_mul", "backward_", into="gate_up_T2F"), MLP, MLP),
    (Fault("silu_mul", "backward_", into="dy_TF"), ("down_proj",), ("down_proj",)),
    (Fault("qk_norm_rope", "forward", of=0), ("k_norm", *QKV), QKV),
    (Fault("qk_norm_rope", "forward", of=1), ("q_norm", *QKV), QKV),
    (Fault("qk_norm_rope", "backward", into="dxq_TNH"), ("q_proj",), ("q_proj",)),
    (Fault("qk_norm_rope", "backward", into="dxk_TKH"), ("k_proj",), ("k_proj",)),
    (Fault("qk_norm_rope", "backward", of=0), ("q_norm", "k_norm"), NOTHING),
    (Fault("attention", "forward", of=0), ("o_proj", "q_proj"), ("o_proj", "q_proj")),
    (Fault("attention", "backward", of=0), ("q_proj", "q_norm"), ("q_proj",)),
    (Fault("attention", "backward", of=1), ("k_proj", "k_norm"), ("k_proj",)),
    (Fault("attention", "backward", into="dv_TKH"), ("v_proj",), ("v_proj",)),
    (Fault("sigmoid_gate", "forward", into="y_TM"), ("v_proj", "o_proj"), ("v_proj", "o_proj")),
    (Fault("sigmoid_gate", "backward_", of=0), QKV, QKV),
    (Fault("sigmoid_gate", "backward_", into="dgate_TNH"), ("q_proj",), ("q_proj",)),
    (Fault("sigmoid_gate", "backward_", into="dy_TM"), ("o_proj",), ("o_proj",)),
    (Fault("causal_conv", "forward", of=0), ("in_proj_qkv", "conv1d", *RATES), ("in_proj_qkv",)),
    (Fault("causal_conv", "forward", of=1), ("in_proj_qkv", "conv1d", *RATES), ("in_proj_qkv",)),
    (Fault("causal_conv", "forward", of=2), ("in_proj_qkv", "conv1d", *RATES), ("in_proj_qkv",)),
    (Fault("causal_conv", "backward", into="dx_TC"), ("in_proj_qkv",), ("in_proj_qkv",)),
    (Fault("causal_conv", "backward", of=0), ("conv1d",), NOTHING),
    (Fault("gated_delta", "forward", of=0), ("in_proj_qkv", "in_proj_a", "in_proj_b", *RATES), ("in_proj_qkv",)),
    (Fault("gated_delta", "backward", of=0), ("in_proj_qkv", "conv1d"), ("in_proj_qkv",)),
    (Fault("gated_delta", "backward", of=1), ("in_proj_qkv", "conv1d"), ("in_proj_qkv",)),
    (Fault("gated_delta", "backward", of=3), ("in_proj_qkv", "conv1d"), ("in_proj_qkv",)),
    (Fault("gated_delta", "backward", of=4), RATES, NOTHING),
    (Fault("gated_delta", "backward", into="da_TN"), ("in_proj_a",), NOTHING),
    (Fault("gated_delta", "backward", into="db_TN"), ("in_proj_b",), NOTHING),
    (Fault("gated_norm", "forward", into="y_TM"), ("in_proj_qkv", "conv1d", *RATES), ("out_proj", "in_proj_qkv")),
    (Fault("gated_norm", "backward_", of=0), ("in_proj_qkv", "in_proj_a", "in_proj_b", *RATES), ("in_proj_qkv",)),
    (Fault("gated_norm", "backward_", into="dz_TNE"), ("in_proj_z",), ("in_proj_z",)),
    (Fault("gated_norm", "backward_", into="dy_TM"), ("out_proj",), ("out_proj",)),
    (Fault("gated_norm", "backward_", of=1), ("linear_attn.norm",), NOTHING),
    (Fault("linear_cross_entropy", "forward", of=0), NOTHING, NOTHING),  # the loss: test_verify_lossless sees it
    (Fault("linear_cross_entropy", "forward", into="dhidden_ND"), ALL, ALL),
    (Fault("linear_cross_entropy", "forward", into="dweight_VD"), ("embed_tokens",), NOTHING),
    (Fault("lora_linear", "forward", of=0), ALL, ALL),
    (Fault("lora_linear", "forward", of=1), NOTHING, ALL),
    (Fault("lora_linear", "input_gradient", of=0), ALL, ALL),
    (Fault("lora_linear", "input_gradient", of=1), NOTHING, ALL),
    (Fault("lora_linear", "adapter_gradient", of=0), NOTHING, RULE),
    (Fault("lora_linear", "add_weight_gradients", master="lora_a"), NOTHING, ALL),
    (Fault("lora_linear", "add_weight_gradients", master="lora_b"), NOTHING, ALL),
    (Fault("lora_linear", "add_weight_gradients", master="weight"), (*ALL, "in_proj_a", "in_proj_b"), NOTHING),
    (Fault("lora_linear", "add_weight_gradients", master="bias"), BIASES, NOTHING),
]

Gradients = Callable[[], Certificate]


def pack(count: int, seed: int) -> Pack:
    documents = [Document(i, *made) for i, made in enumerate(ready.documents(count, longest=70, seed=seed))]
    return Pack(documents, sum(len(d.ids) for d in documents), sum(label_count(d.trained) for d in documents))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 whose attention has biases."""
    return tiny.hybrid(tmp_path_factory.mktemp("biased"), attention_bias=True)


@pytest.fixture(scope="module", params=["full", "lora"])
def judged(
    request: pytest.FixtureRequest, biased: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Gradients]]:
    """The mode, and a call that gives the certificate of step 0 for the native engine as it is then, in fp32."""
    plan = ready.plan(engine="native", mode=request.param)
    setting = Setting(plan, biased, [pack(3, 1)], [])
    with exactly():
        truth, judge = Truth(tmp_path_factory.mktemp("truth")), partial(load_judge, setting)
        ask = partial(measure, setting, truth=truth, what="", progress=silent, gradients_alone=True)
        judges = Judges(ask(partial(judge, torch.float32), making=True), ask(partial(judge, torch.bfloat16)))
        made: Any = native.load(plan, biased, {}, torch.float32)
        fill_adapters(made.parameters(), plan.seed)

        def gradients() -> Certificate:
            found, one = Measured(), setting.packs[0]
            for parameter in made.parameters().values():
                parameter.grad = None
            made.micro_step(one, 1 / one.labels)
            add_distances(found.distances, made, truth.of(0))
            return certificate(plan, judges, Judged(judges.theirs, found, None))

        yield request.param, gradients


def seen(found: Certificate) -> set[str]:
    """Tensors that the certificate refuses, as the table calls them."""
    return {re.sub(r"\.lora_[AB]|\.weight$", "", row.name) for row in found.tensors if not (row.excess or 0) <= 1}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0].operator}-{row[0].function}-{row[0].result}")
def test_one_per_cent_in_an_operator_is_seen_where_the_table_says(
    judged: tuple[str, Gradients], row: tuple[Fault, tuple[str, ...], tuple[str, ...]]
) -> None:
    mode, gradients = judged
    fault, *expected = row
    with fault.planted():
        found = gradients()
    names, wanted = seen(found), expected[mode == "lora"]
    missing = [name for name in wanted if not any(refused.endswith(name) for refused in names)]
    assert missing == []
    assert bool(names) == bool(wanted)
    assert bool(found.problems) == bool(wanted)
    if wanted:
        assert "a formula differs" in found.problems[0]


def test_without_a_fault_nothing_is_seen(judged: tuple[str, Gradients]) -> None:
    found = judged[1]()
    assert found.problems == []
    assert max(row.formula or 0 for row in found.tensors) < 1e-5  # observed: up to 3e-6


def test_every_result_of_every_operator_is_in_the_table(biased: Path) -> None:
    """What the layers call of each: found by watching a micro-step, since signatures don't say what is written to."""
    from sparkctl.train.engines.native import layers, model

    operators = {
        value.__name__.split(".")[1]
        for module in (layers, model)
        for value in vars(module).values()
        if getattr(value, "__name__", "").endswith(".op")
    } | {LINEAR}
    found: set[tuple[str, str, str]] = set()
    for mode in ("full", "lora"):
        made = native.load(ready.plan(engine="native", mode=mode), biased, {})  # bf16, which has copies to write
        with watched(operators) as results:
            made.micro_step(pack(2, 1), 1.0)
        found |= results
    found.remove((LINEAR, "forward", "wide"))  # u beside x, which the product in there reads and nothing after it
    assert {operator for operator, *_ in found} == operators
    assert found == {(fault.operator, fault.function, fault.result) for fault, *_ in TABLE}


def test_methods_that_are_watched_are_all_that_compute() -> None:
    layer = owner_of(LINEAR)
    public = {name for name in dir(layer) if callable(getattr(layer, name)) and not name.startswith("_")}
    assert public == {*METHODS, "buffer", "copies"}
