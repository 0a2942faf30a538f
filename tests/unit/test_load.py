"""The text model as it is trained: precision, frozen, silent, complete, and on a CPU with or without fla."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError
from sparkctl.model.load import load_text_model
from sparkctl.model.plain import plain_layers

CPU = torch.device("cpu")
F32 = ("A_log", "linear_attn.norm.weight")


@pytest.fixture
def folder(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A Qwen3.5 that may be changed."""
    return Path(shutil.copytree(qwen35_folder, tmp_path / "model"))


def configured(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(values)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    for shard in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_tensors_published_in_f32_stay_so_to_the_last_bit(qwen35_folder: Path) -> None:
    model = load_text_model(qwen35_folder, dtype=torch.bfloat16, device=CPU)
    there = merging.tensors(qwen35_folder)
    wide = 0
    for name, parameter in model.named_parameters():
        published = there[name.replace("model.", "model.language_model.", 1)]
        assert parameter.dtype == published.dtype
        assert parameter.dtype == (torch.float32 if name.endswith(F32) else torch.bfloat16)
        assert torch.equal(parameter, published), name
        # the values are such that a rounding on the way would show
        wide += published.dtype == torch.float32 and not torch.equal(published.bfloat16().float(), published)
    assert wide == 6


def test_in_fp32_all_is_fp32(qwen35_folder: Path) -> None:
    model = load_text_model(qwen35_folder, dtype=torch.float32, device=CPU)
    there = merging.tensors(qwen35_folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, there[name.replace("model.", "model.language_model.", 1)].float())


def test_a_model_published_in_f32_stays_so(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    changed(folder, lambda name, tensor: tensor.float() + 1e-4)
    model = load_text_model(configured(folder, dtype="float32"), dtype=torch.bfloat16, device=CPU)
    assert all(torch.equal(p, load_file(folder / "model.safetensors")[n]) for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_is_the_text_part_frozen_without_dropout_or_cache(folder: Path, tmp_path: Path) -> None:
    kinds = {configured(folder, attention_dropout=0.3): "Qwen3_5ForCausalLM"}
    for family, kind in (("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM")):
        (tmp_path / family).mkdir()
        kinds[configured(tiny.dense(tmp_path / family, family), attention_dropout=0.3)] = kind
    for path, kind in kinds.items():
        model = load_text_model(path, dtype=torch.bfloat16, device=CPU)
        assert type(model).__name__ == kind
        assert not any("visual" in name or "mtp" in name for name, _ in model.named_parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache is False
        ids = torch.arange(40)[None]
        assert model(input_ids=ids).past_key_values is None
        model.train()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: merging.drop(folder, name)


def extra(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = sorted(index["weight_map"].values())[0]
    save_file({**load_file(folder / shard), "model.language_model.more.weight": torch.ones(1)}, folder / shard)
    index["weight_map"]["model.language_model.more.weight"] = shard
    path.write_text(json.dumps(index))


LAYER = "model.language_model.layers.3."


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without(LAYER + "mlp.up_proj.weight"), r"lacks `model\.layers\.3\.mlp\.up_proj\.weight`"),
        (without("model.language_model.embed_tokens.weight"), r"lacks .*embed_tokens\.weight"),
        (without(LAYER + "self_attn.q_norm.weight"), r"lacks `model\.layers\.3\.self_attn\.q_norm\.weight`"),
        (extra, r"holds unknown `model\.(language_model\.)?more\.weight`"),
        (
            lambda folder: changed(folder, lambda n, t: t[:-1] if n == LAYER + "mlp.up_proj.weight" else t),
            r"holds in another shape than config\.json says `model\.layers\.3\.mlp\.up_proj\.weight`",
        ),
        (
            lambda folder: changed(folder, lambda n, t: t.to(torch.float8_e4m3fn) if "layers.3.mlp" in n else t),
            r"quantised: `model\.language_model\.layers\.3\.mlp\.\w+\.weight` is F8_E4M3",
        ),
        (lambda folder: (folder / "model-mtp.safetensors").unlink(), "model-mtp.safetensors`, which the index names"),
    ],
)
def test_weights_that_are_not_the_configs_are_named(damage: Callable[[Path], object], named: str, folder: Path) -> None:
    load_text_model(folder, dtype=torch.bfloat16, device=CPU)
    damage(folder)
    with pytest.raises(SparkError, match=named) as caught:
        load_text_model(folder, dtype=torch.bfloat16, device=CPU)
    assert str(folder) in caught.value.message


def test_a_tied_head_that_is_stored_too(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_text_model(folder, dtype=torch.bfloat16, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_code_in_a_folder_is_not_run(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    configured(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"})
    load_text_model(folder, dtype=torch.bfloat16, device=CPU)
    assert not ran.exists()


LOGITS = """
import sys, torch
from pathlib import Path
kernels, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
if kernels == "without":
    sys.modules["fla"] = sys.modules["causal_conv1d"] = None
from sparkctl.model.load import load_text_model
from sparkctl.model.lora import add_adapters
ids = (torch.arange(75) * 37 % 256)[None]
model = load_text_model(folder, dtype=torch.float32, device=torch.device("cpu"))
model = add_adapters(model, 2, 2, 0, ["in_proj_qkv", "q_proj"])
logits = model(input_ids=ids, use_cache=False).logits
logits.square().sum().backward()
found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"logits": logits.detach()}
assert not sys.stderr.seek(0, 2), "something was said"
if kernels == "without":
    from transformers import AutoModelForCausalLM
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(stock.model.layers[0].linear_attn) is not type(model.get_base_model().model.layers[0].linear_attn)
    found["stock"] = stock(input_ids=ids, use_cache=False).logits.detach()
torch.save(found, out)
"""


def logits(kernels: str, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Logits and gradients of a process of its own, with or without fla."""
    with out.with_suffix(".txt").open("wb") as said:
        status = subprocess.call(
            [sys.executable, "-c", LOGITS, kernels, str(folder), str(out)], stdout=said, stderr=said,
            env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert status == 0, out.with_suffix(".txt").read_text()
    return torch.load(out)


def test_on_a_cpu_installed_kernels_change_nothing_and_nothing_is_said(qwen35_folder: Path, tmp_path: Path) -> None:
    bare = logits("without", qwen35_folder, tmp_path / "bare")
    assert torch.equal(bare["logits"], bare.pop("stock"))
    with_kernels = logits("with", qwen35_folder, tmp_path / "with")
    assert len(bare) == 1 + 2 * 4
    assert all(torch.equal(with_kernels[name], tensor) for name, tensor in bare.items())
    assert all(float(tensor.norm()) > 0 for name, tensor in bare.items() if "lora_A" not in name)  # B is zero at first


def test_only_the_listed_layers_are_swapped_and_they_keep_their_tensors(qwen35_folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    model = AutoModelForCausalLM.from_pretrained(qwen35_folder, dtype=torch.float32)
    before = {
        name: (parameter, type(module))
        for name, module in model.named_modules()
        for parameter in [*module.parameters()]
    }
    code = {name: getattr(theirs, name) for name in vars(theirs)}
    names = [name for name, _ in model.named_parameters()]
    plain_layers(plain_layers(model))
    assert [name for name, _ in model.named_parameters()] == names
    changed = set()
    for name, module in model.named_modules():
        if name in before and type(module) is not before[name][1]:
            changed.add((type(module).__name__, before[name][1].__name__))
            assert isinstance(module, before[name][1])
    assert changed == {("PlainQwen3_5GatedDeltaNet", "Qwen3_5GatedDeltaNet")}
    assert all(getattr(theirs, name) is value for name, value in code.items())  # nothing is assigned into transformers


def test_a_plain_layer_generates_with_a_cache(qwen35_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = plain_layers(AutoModelForCausalLM.from_pretrained(qwen35_folder, dtype=torch.float32))
    ids = (torch.arange(9) * 37 % 256)[None]
    said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert said.shape == (1, 21)
    for at in range(9, 21):  # token by token from the start, without a cache
        assert model(input_ids=said[:, :at], use_cache=False).logits[0, -1].argmax() == said[0, at]
