"""The audit finds every tensor that is missing, unknown or of another shape, and nothing in a whole checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sparkctl.model.audit import audit

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A whole multimodal Qwen3.5 that may be damaged."""
    folder = Path(shutil.copytree(qwen35_folder, tmp_path / "model"))
    return counted(folder)


def counted(folder: Path) -> Path:
    """State the right total in the index."""
    total = sum(tensor.nbytes for tensor in merging.tensors(folder).values())
    return indexed(folder, lambda index: index.update(metadata={"total_size": total}))


def indexed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def configured(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """Put a tensor into the single file, or into the shard that the index names, or the first."""
    shard = "model.safetensors"
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        shard = weight_map.get(name, sorted(weight_map.values())[0])
        indexed(folder, lambda index: index["weight_map"].update({name: shard}))
    save_file({**load_file(folder / shard), name: tensor}, folder / shard, metadata={"format": "pt"})
    return counted(folder) if (folder / INDEX).exists() else folder


def test_a_whole_one_has_no_problem(folder: Path) -> None:
    assert audit(folder) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_dense_families(family: str, tmp_path: Path) -> None:
    folder = tiny.dense(tmp_path, family)
    assert audit(folder) == []
    tensors = load_file(folder / "model.safetensors")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in tensors)
    if tied:  # a copy may be stored, of the right shape
        assert audit(rewritten(folder, "lm_head.weight", torch.ones(272, 32))) == []
        assert len(audit(rewritten(folder, "lm_head.weight", torch.ones(271, 32)))) == 1
    else:
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors")
        assert audit(folder) == ["config.json promises `lm_head.weight`, and it is missing"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_inverse_frequencies_of_old_checkpoints(family: str, tmp_path: Path) -> None:
    """transformers passes over them on loading."""
    folder = tiny.dense(tmp_path, family)
    assert audit(rewritten(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))) == []
    assert len(audit(rewritten(folder, "model.layers.0.self_attn.rotary_emb.freq", torch.ones(8)))) == 1


def test_an_mtp_head_that_config_json_does_not_promise(folder: Path) -> None:
    """Though transformers' class passes over it: vLLM does not."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    assert len(audit(folder)) == 15


def test_a_single_missing_tensor_of_each_is_found(folder: Path) -> None:
    mtp = tiny.mtp_tensors(hidden=8, heads=1, kv_heads=1, head_dim=4, ffn=8, seed=0)
    names = [
        "model.language_model.embed_tokens.weight", "model.language_model.layers.0.linear_attn.A_log",
        "model.visual.blocks.1.mlp.linear_fc1.bias", *mtp,
    ]  # fmt: skip
    for name in names:
        merging.drop(folder, name)
        counted(folder)
        found = audit(folder)
        assert f"config.json promises `{name}`, and it is missing" in found
        assert len(found) == names.index(name) + 1  # all at once: those of the turns before too


@pytest.mark.parametrize("name", ["model.language_model.layers.0.linear_attn.extra", "mtp.layers.1.norm", "stray"])
def test_a_tensor_that_nobody_promised(name: str, folder: Path) -> None:
    assert audit(rewritten(folder, name, torch.ones(2))) == [f"`{name}` is there, and config.json does not promise it"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", [64, 32]),
        ("model.visual.pos_embed.weight", [16, 16]),
        ("mtp.fc.weight", [32, 64]),
        ("mtp.layers.0.self_attn.q_proj.weight", [64, 32]),
        ("mtp.layers.0.mlp.down_proj.weight", [32, 64]),
    ],
)
def test_another_shape(name: str, shape: list[int], folder: Path) -> None:
    assert list(merging.tensors(folder)[name].shape) == shape
    wrong = [shape[0], shape[1] + 1]
    assert audit(rewritten(folder, name, torch.ones(wrong))) == [
        f"`{name}` has shape {wrong}, and config.json promises {shape}"
    ]


def test_the_promised_mtp_head_is_one_layer_or_none(folder: Path) -> None:
    configured(folder, lambda config: config["text_config"].update(mtp_num_hidden_layers=0))
    found = audit(folder)
    assert len(found) == 15
    assert all(re.fullmatch(r"`mtp\..*` is there, and config.json does not promise it", problem) for problem in found)
    configured(folder, lambda config: config["text_config"].update(mtp_num_hidden_layers=2))
    assert any("promises 2 layers of MTP head" in problem for problem in audit(folder))
    configured(
        folder, lambda config: config["text_config"].update(mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=True)
    )
    assert any("embeddings of its own" in problem for problem in audit(folder))


def test_without_a_promise_there_is_none_to_keep(folder: Path) -> None:
    configured(folder, lambda config: config["text_config"].pop("mtp_num_hidden_layers"))
    for name in list(merging.tensors(folder)):
        if name.startswith("mtp."):
            merging.drop(folder, name)
    (folder / "model-mtp.safetensors").unlink()
    assert audit(counted(folder)) == []


@pytest.mark.parametrize("through", ["multimodal", "text"])
def test_what_transformers_saves_text_only(through: str, folder: Path, tmp_path: Path) -> None:
    """Its names follow what the model came from; that it lost the MTP head is what the audit is for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path / "text"
    if through == "text":
        config = AutoConfig.from_pretrained(folder).get_text_config()
        AutoModelForCausalLM.from_config(config).save_pretrained(out)
    else:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_5_text"
    nested = "model.language_model.norm.weight" in load_file(out / "model.safetensors")
    assert nested == (through == "multimodal")
    found = audit(out)
    assert len(found) == 15
    assert all(problem.startswith("config.json promises `mtp.") for problem in found)
    configured(out, lambda config: config.update(mtp_num_hidden_layers=0))
    assert audit(out) == []
    mixed = load_file(out / "model.safetensors")
    name = "model.norm.weight" if not nested else "model.language_model.norm.weight"
    mixed["model.language_model.norm.weight" if not nested else "model.norm.weight"] = mixed.pop(name)
    save_file(mixed, out / "model.safetensors")
    assert audit(out)  # one layout or the other, not both


def test_an_index_that_counts_or_places_wrongly(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["metadata"]["total_size"] += 1

    found = audit(indexed(folder, change))
    assert [bool(re.search(r"total_size of \d+ bytes, and its tensors take \d+", problem)) for problem in found] == [
        True
    ]
    counted(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    first, last = sorted(set(weight_map.values()))[:2]
    name = next(name for name, shard in weight_map.items() if shard == first)
    indexed(folder, lambda index: index["weight_map"].pop(name))
    found = audit(counted(folder))
    assert f"`{first}` holds `{name}`, which the index does not place there" in found
    assert f"config.json promises `{name}`, and it is missing" in found
    indexed(folder, lambda index: index["weight_map"].update({name: last}))
    found = audit(folder)
    assert any(f"`{folder / last}` lacks `{name}`" in problem for problem in found)
    indexed(folder, lambda index: index["weight_map"].update({name: first}))
    assert audit(counted(folder)) == []
    (folder / last).unlink()
    found = audit(folder)
    assert f"`{folder / last}`, which the index names, is missing" in found
    assert sum("promises" in problem for problem in found) == sum(shard == last for shard in weight_map.values())
    indexed(folder, lambda index: index.pop("metadata"))
    assert audit(folder)


def test_no_weights_no_config_no_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ["config.json" in problem for problem in audit(tmp_path / "empty")] == [True]
    shutil.copy(folder / "config.json", tmp_path / "empty")
    assert ["holds no weights" in problem for problem in audit(tmp_path / "empty")] == [True]
    config = (folder / "config.json").read_text()
    for text in (
        "{",
        "[]",
        "3",
        '{"model_type": "nothing-known"}',
        config.replace('"hidden_size": 32', '"hidden_size": "x"'),
    ):
        (folder / "config.json").write_text(text)
        found = audit(folder)
        assert ["config.json" in problem for problem in found] == [True], found


def test_it_says_nothing_itself(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    audit(folder)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
