"""What the native engine computes: the dims that its kernels for a GPU take, any on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plans
import pytest
import ready
import tiny
import torch
from sparkctl_kernels.attention import kernel as attention
from sparkctl_kernels.shapes import DENSE, QWEN35

from sparkctl.errors import UsageError
from sparkctl.hardware.shape import head_dim
from sparkctl.manifest.schema import Choices, Machine
from sparkctl.model import catalog
from sparkctl.model.families import count
from sparkctl.model.inspect import ModelInfo
from sparkctl.model.served import lacking
from sparkctl.mtp import drafter
from sparkctl.steps import recommend as step
from sparkctl.train.engines.native import engine as native

HYBRID = catalog.config("qwen3.5-0.8b")["text_config"]
HALF = dict(HYBRID["rope_parameters"], partial_rotary_factor=0.5)


def info(kind: str = "llama", **values: Any) -> ModelInfo:
    """A model of that config.json."""
    config = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4) | values
    return ModelInfo(kind, **vars(count(kind, config, Path("config.json"))))


def hybrid(**values: Any) -> ModelInfo:
    """A Qwen3.5 0.8B, but for `values`."""
    return info(**dict(HYBRID, kind="qwen3_5_text") | values)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (info(hidden_size=1280), "attention heads of 80 dims"),
        (info(head_dim=96), "attention heads of 96 dims"),
        (info("mistral", head_dim=192), "attention heads of 192 dims"),
        (info("qwen3", head_dim=512), "attention heads of 512 dims"),
        (info("qwen2", hidden_size=128), "attention heads of 8 dims"),
        (hybrid(head_dim=96), "attention heads of 96 dims"),
        (hybrid(rope_parameters=HALF | dict(partial_rotary_factor=0.75)), "rotations of 192 dims"),
        (hybrid(rope_parameters=HALF | dict(partial_rotary_factor=0.0)), "rotations of 0 dims"),
        (hybrid(linear_key_head_dim=96), "GatedDeltaNet keys of 96 dims"),
        (hybrid(linear_key_head_dim=512), "GatedDeltaNet keys of 512 dims"),
        (hybrid(linear_value_head_dim=96), "GatedDeltaNet values of 96 dims"),
    ],
)
def test_dims_that_no_kernel_takes_are_named_for_a_gpu_and_right_on_a_cpu(model: ModelInfo, what: str) -> None:
    found = lacking(model, "cuda")
    assert found
    assert found.startswith(f"{what} on a GPU, which takes powers of two from ")
    assert lacking(model, "cpu") is None


@pytest.mark.parametrize(
    "model",
    [
        info(), info(head_dim=16), info(head_dim=32), info(head_dim=256), info("qwen3"), info("qwen2"), hybrid(),
        hybrid(rope_parameters=HALF), hybrid(rope_parameters=dict(rope_type="default", rope_theta=1e7)),
        hybrid(linear_key_head_dim=256, linear_value_head_dim=64),
    ],
)  # fmt: skip
def test_dims_that_the_kernels_take(model: ModelInfo) -> None:
    assert lacking(model, "cuda") is None


def test_the_shapes_that_kernels_are_compiled_for_are_served() -> None:
    for name in catalog.NAMES:
        config = catalog.config(name)
        assert lacking(ModelInfo("qwen3_5", **vars(count("qwen3_5", config, Path("config.json")))), "cuda") is None
    for shape in (*QWEN35, *DENSE):
        assert lacking(info(head_dim=shape.head_dim), "cuda") is None, shape


def test_the_widest_head_is_the_widest_that_attention_has_tiles_for() -> None:
    widest = max(attention.SMALL)
    assert lacking(info(head_dim=widest), "cuda") is None
    assert lacking(info(head_dim=2 * widest), "cuda")
    for dim in (dim for dim in range(16, 2 * widest, 8) if not lacking(info(head_dim=dim), "cuda")):
        for window in (None, 16):
            assert len(attention.tiles(torch.empty(1, 1, dim, dtype=torch.bfloat16), window)) == 3


def test_the_head_dim_is_given_or_follows() -> None:
    assert head_dim(dict(head_dim=96, hidden_size=1024, num_attention_heads=16)) == 96
    assert head_dim(dict(head_dim=None, hidden_size=1024, num_attention_heads=16)) == 64
    assert head_dim(dict(hidden_size=1280, num_attention_heads=16)) == 80


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A Llama with heads of 24 dims."""
    tiny.dense(tmp_path / "model", "llama", head_dim=24)
    return tmp_path / "model"


def test_the_engine_refuses_them_on_a_gpu_before_it_loads(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "planned_device", lambda kind, name: torch.device(kind))  # there is no GPU here
    machine = ready.plan().machine.model_copy(update={"device": "cuda"})
    with pytest.raises(UsageError, match="the native engine has nothing for attention heads of 24 dims") as caught:
        native.load(ready.plan(machine=machine), narrow, {}, name="runs/r1")
    assert caught.value.hint == "sparkctl recommend runs/r1 --engine reference"
    assert native.load(ready.plan(), narrow, {}).name == "native"


def test_a_head_is_not_trained_on_a_model_that_a_gpu_cannot_compute(
    qwen35_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((qwen35_folder / "config.json").read_text())
    config["text_config"]["linear_key_head_dim"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(drafter, "planned_device", lambda kind, name: torch.device(kind))
    with pytest.raises(UsageError, match="nothing for GatedDeltaNet keys of 24 dims on a GPU") as caught:
        drafter.Drafter.load(tmp_path, None, "cuda", name="runs/r1")
    assert caught.value.hint == "the base's own head needs none: `sparkctl mtp inject runs/r1 --mode default`"


@pytest.mark.parametrize(("machine", "engine"), [(plans.SPARK, "reference"), (plans.CPU, "native")])
def test_recommend_takes_the_reference_where_a_gpu_trains(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, engine: str
) -> None:
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(step, "this_machine", lambda: machine)
    run = ready.run(tmp_path / "r1", narrow)
    with run.edit() as manifest:
        manifest.plan = None
    asked = step.Request(run.root, Choices())
    plan = step.recommend(asked).plan
    assert plan.engine == engine
    if engine == "reference":
        assert plan.reasons["engine"].startswith(
            "the native engine has nothing for attention heads of 24 dims on a GPU"
        )
        with pytest.raises(UsageError, match="nothing for attention heads of 24 dims on a GPU") as caught:
            step.recommend(replace(asked, flags=Choices(engine="native")), force=True)
        assert caught.value.hint == f"sparkctl recommend {run.root} --engine reference"
