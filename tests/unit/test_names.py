"""Live, checkpoint and adapter names of the three layouts that checkpoints have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import merging
import pytest
import torch

from sparkctl.errors import SparkError
from sparkctl.model import names
from sparkctl.model.load import load_text_model
from sparkctl.model.lora import adapter_tensors, add_adapters
from sparkctl.model.names import NameMap
from sparkctl.model.weights import Checkpoint


def multimodal(folder: Path, qwen35: Path, llama: Path) -> tuple[Path, str]:
    return qwen35, "model.language_model."


def dense(folder: Path, qwen35: Path, llama: Path) -> tuple[Path, str]:
    return llama, "model."


def text_only(folder: Path, qwen35: Path, llama: Path) -> tuple[Path, str]:
    """As the text-only class itself names them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    config = AutoConfig.from_pretrained(qwen35).get_text_config()
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder, "model."


def text_only_from_multimodal(folder: Path, qwen35: Path, llama: Path) -> tuple[Path, str]:
    """As transformers saves a text-only model that it loaded from a multimodal checkpoint."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(qwen35).save_pretrained(folder)
    return folder, "model.language_model."


@pytest.mark.parametrize("make", [multimodal, dense, text_only, text_only_from_multimodal])
def test_each_live_parameter_has_its_tensor(
    make: Callable[[Path, Path, Path], tuple[Path, str]], tmp_path: Path, qwen35_folder: Path, llama_folder: Path
) -> None:
    folder, prefix = make(tmp_path, qwen35_folder, llama_folder)
    model = load_text_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    there, found = merging.tensors(folder), {}
    for live, parameter in model.named_parameters():
        name = NameMap(model).checkpoint(live)
        assert torch.equal(parameter, there[name]), name
        assert (names.live_name(name), name.startswith((prefix, "lm_head."))) == (live, True)
        found[name] = live
    assert set(found) == {name for name in there if not name.startswith(("mtp.", "model.visual."))}
    check_adapters(model, folder, prefix)


def check_adapters(model: Any, folder: Path, prefix: str) -> None:
    """Names stay what they are once peft has wrapped the modules."""
    before = {live: NameMap(model).checkpoint(live) for live, _ in model.named_parameters()}
    adapted = add_adapters(model, 2, 2, 0, ["q_proj", "up_proj"])
    wrapped = {live.replace(".base_layer", "") for live, _ in model.named_parameters() if ".base_layer" in live}
    assert wrapped
    for live, _ in model.named_parameters():
        if "lora_" not in live:
            assert NameMap(model).checkpoint(live) == before[live.replace(".base_layer", "")]
    modules = {name.partition(".lora_")[0] for name in adapter_tensors(adapted)}
    assert modules == {before[live].removesuffix(".weight") for live in wrapped}
    assert all(f"{module}.weight" in Checkpoint(folder).names() and module.startswith(prefix) for module in modules)


def test_a_name_without_a_tensor_is_named(llama_folder: Path) -> None:
    model = load_text_model(llama_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.raises(SparkError, match=r"no `model\.layers\.7\.x` for the model's `model\.layers\.7\.x`"):
        NameMap(model).checkpoint("model.layers.7.x")


def test_names_of_other_parts_stay() -> None:
    for name in ("lm_head.weight", "mtp.norm.weight", "model.visual.blocks.0.norm1.weight"):
        assert names.live_name(name) == name
    assert names.nested_name("lm_head.weight") == "lm_head.weight"
    assert names.nested_name("model.norm.weight") == "model.language_model.norm.weight"
