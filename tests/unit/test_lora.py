"""Adapters that are the same from the same seed, whatever else has happened, and peft's in form and spread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkctl.errors import SparkError
from sparkctl.model.load import load_text_model
from sparkctl.model.lora import adapter_tensors, add_adapters, initial_a

TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z", "out_proj",
)  # fmt: skip
CPU = torch.device("cpu")
PINNED = [-0.04024225473403931, -0.08893793821334839, -0.2950834631919861, 0.22358399629592896]


def adapted(folder: Path, seed: int = 7, *, targets: tuple[str, ...] = TARGETS, r: int = 4, alpha: int = 8) -> Any:
    return add_adapters(load_text_model(folder, dtype=torch.bfloat16, device=CPU), r, alpha, seed, targets)


def test_form(qwen35_folder: Path) -> None:
    model = adapted(qwen35_folder)
    found = adapter_tensors(model)
    layer = "model.language_model.layers"
    assert list(found)[:2] == [
        f"{layer}.0.linear_attn.out_proj.lora_A.weight",
        f"{layer}.0.linear_attn.out_proj.lora_B.weight",
    ]
    modules = {name.removesuffix(f".lora_{x}.weight") for x in "AB" for name in found if f".lora_{x}." in name}
    assert len(found) == 2 * len(modules) == 2 * (3 * 6 + 7)
    assert {module.rpartition(".")[2] for module in modules} == set(TARGETS)
    assert list(found) == [
        f"{module}.lora_{x}.weight" for module in dict.fromkeys(n.partition(".lora_")[0] for n in found) for x in "AB"
    ]
    assert [int(name.split("layers.")[1].split(".")[0]) for name in found] == sorted(
        int(name.split("layers.")[1].split(".")[0]) for name in found
    )
    assert all(p.dtype == torch.float32 and p.requires_grad for p in found.values())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in found.values()}
    q = f"{layer}.3.self_attn.q_proj"
    assert (found[f"{q}.lora_A.weight"].shape, found[f"{q}.lora_B.weight"].shape) == ((4, 32), (64, 4))


def test_first_values(qwen35_folder: Path) -> None:
    found = adapter_tensors(adapted(qwen35_folder, r=16))
    for name, tensor in found.items():
        if ".lora_B." in name:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        tensor = tensor.detach()
        assert float(tensor.abs().max()) <= bound
        # uniform: observed within 6 % of bound / sqrt(3) for the smallest of them, 512 numbers
        assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.12)
    firsts = [float(tensor.detach()[0, 0]) for name, tensor in found.items() if ".lora_A." in name]
    assert len(set(firsts)) == len(firsts)  # no two modules begin alike


def test_spread_is_pefts(qwen35_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_text_model(qwen35_folder, dtype=torch.bfloat16, device=CPU)
    theirs = get_peft_model(base, LoraConfig(r=1024, lora_alpha=1, target_modules=["down_proj"]))
    wanted = torch.cat([p.detach().flatten() for n, p in theirs.named_parameters() if "lora_A" in n])
    ours = torch.cat([initial_a(f"layers.{i}", 1024, 64, 0).flatten() for i in range(4)])
    assert wanted.shape == ours.shape

    def alike(drawn: torch.Tensor) -> bool:  # range and shape, relative; observed 9e-6 and 1e-3
        ranges = [float(x.max() - x.min()) for x in (drawn, wanted)]
        spreads = [float(x.std() / (x.max() - x.min())) for x in (drawn, wanted)]
        return abs(ranges[0] / ranges[1] - 1) < 1e-3 and abs(spreads[0] / spreads[1] - 1) < 5e-3

    assert alike(ours)
    assert not alike(1.01 * ours)
    assert not alike(ours.sign() * ours.abs() ** 1.02)


def test_the_same_seed_gives_the_same_whatever_came_before(qwen35_folder: Path) -> None:
    torch.manual_seed(1)
    first = adapter_tensors(adapted(qwen35_folder))
    torch.manual_seed(2)
    torch.rand(3)
    again = adapter_tensors(adapted(qwen35_folder))
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    fewer = adapter_tensors(adapted(qwen35_folder, targets=("up_proj", "q_proj")))  # nor on what else is adapted
    assert fewer
    assert all(torch.equal(first[name], tensor) for name, tensor in fewer.items())
    other = adapter_tensors(adapted(qwen35_folder, 8))
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
    for name, tensor in first.items():
        module, _, half = name.partition(".lora_")
        if half == "A.weight":
            assert torch.equal(tensor, initial_a(module, 4, tensor.shape[1], 7))


def test_values_are_pinned_across_versions() -> None:
    """A run resumed or compared after an upgrade starts from the same adapter."""
    assert initial_a("model.layers.0.mlp.up_proj", 1, 4, 7).tolist() == [PINNED]


def test_torchs_random_state_is_left_alone(qwen35_folder: Path) -> None:
    model = load_text_model(qwen35_folder, dtype=torch.bfloat16, device=CPU)
    before = torch.get_rng_state()
    add_adapters(model, 4, 8, 7, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_scale_is_alpha_over_r_and_at_first_nothing_changes(qwen35_folder: Path) -> None:
    ids = torch.arange(40)[None]
    base = load_text_model(qwen35_folder, dtype=torch.float32, device=CPU)
    before = base(input_ids=ids).logits
    up = base.get_submodule("model.layers.3.mlp.up_proj")
    x = torch.randn(5, 32)
    plain = up(x)
    model = add_adapters(base, 4, 6, 7, TARGETS)
    assert torch.equal(model(input_ids=ids).logits, before)
    found = adapter_tensors(model)
    a, b = (found[f"model.language_model.layers.3.mlp.up_proj.lora_{half}.weight"] for half in "AB")
    with torch.no_grad():
        b.normal_()
    wrapped = base.get_submodule("model.layers.3.mlp.up_proj")
    torch.testing.assert_close(wrapped(x), plain + 6 / 4 * (x @ a.T @ b.T), rtol=1e-5, atol=1e-5)  # observed 0


def test_no_module_to_adapt(llama_folder: Path) -> None:
    with pytest.raises(SparkError, match="none is called in_proj_qkv"):
        adapted(llama_folder, targets=("in_proj_qkv",))
