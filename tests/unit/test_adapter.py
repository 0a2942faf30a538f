"""The adapter alone: peft loads it silently on the class that it is for, and it gives the trained model's logits."""

from __future__ import annotations

import json
from pathlib import Path

import merging
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Lora
from sparkctl.merge.adapter import AdapterClass, write_adapter

LORA = Lora(r=4, alpha=6)
CLASSES: dict[AdapterClass, str] = {
    "multimodal": "Qwen3_5ForConditionalGeneration", "text": "AutoModelForCausalLM",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(qwen35_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merging.adapters(qwen35_folder, tmp_path_factory.mktemp("trained") / "t.safetensors", LORA)


def write(base: Path, trained: Path, out: Path, kind: AdapterClass) -> Path:
    write_adapter(base, trained, out, lora=LORA, kind=kind, source=str(base), revision=None)
    return out


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_peft_loads_it_silently_on_its_class_and_gives_the_trained_models_logits(
    kind: AdapterClass, qwen35_folder: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write(qwen35_folder, trained, tmp_path / "adapter", kind)
    check_loads(CLASSES[kind], qwen35_folder, trained, out, caplog)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_of_one_class(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.dense(tmp_path / "base", family)
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    out = write(base, trained, tmp_path / "adapter", "multimodal")
    check_loads("AutoModelForCausalLM", base, trained, out, caplog)
    other = write(base, trained, tmp_path / "text", "text")
    assert (out / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def check_loads(kind: str, base: Path, trained: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth = merging.logits(merging.trained_model(kind, base, trained, LORA, torch.float32))
    with merging.heard(caplog):
        model = PeftModel.from_pretrained(merging.load(kind, base, torch.float32), out)
    assert not caplog.records, caplog.text
    loaded = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in loaded.values()} == {torch.float32}
    assert len(loaded) == len(load_file(trained))
    # 2e-6 observed; with the adapter off it is 0.03 or more
    assert (merging.logits(model) - truth).abs().max() < 1e-4
    with model.disable_adapter():
        assert (merging.logits(model) - truth).abs().max() > 0.01


def test_on_the_other_class_peft_warns(qwen35_folder: Path, trained: Path, tmp_path: Path) -> None:
    """The check above can fail: this is what the names are made for one class for."""
    out = write(qwen35_folder, trained, tmp_path / "adapter", "text")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(merging.load(CLASSES["multimodal"], qwen35_folder), out)


def test_its_config_says_what_it_is_for(qwen35_folder: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    write_adapter(
        qwen35_folder, trained, out, lora=LORA, kind="text", source="Qwen/Qwen3.5-2B", revision="abc",
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"], config["revision"]) == (
        4, 6, "Qwen/Qwen3.5-2B", "abc",
    )  # fmt: skip
    assert config["target_modules"] == sorted(merging.TARGETS)
    saved = load_file(out / "adapter_model.safetensors")
    for name, tensor in load_file(trained).items():
        live = "base_model.model." + name.replace("model.language_model.", "model.")
        assert torch.equal(saved[live], tensor)


def test_names_that_would_reach_more_modules_are_refused(qwen35_folder: Path, trained: Path, tmp_path: Path) -> None:
    fewer = {n: t for n, t in load_file(trained).items() if "layers.1.mlp.up_proj" not in n}
    save_file(fewer, tmp_path / "t.safetensors")
    with pytest.raises(SparkError, match=r"layers\.1\.mlp\.up_proj"):
        write(qwen35_folder, tmp_path / "t.safetensors", tmp_path / "adapter", "text")
    assert not (tmp_path / "adapter").exists()
