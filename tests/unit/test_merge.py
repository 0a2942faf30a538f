"""A merge rounds once, leaves every other byte alone, and gets its name only where the audit finds nothing."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Lora
from sparkctl.merge import merge
from sparkctl.merge.adapter import write_adapter
from sparkctl.merge.companions import companions
from sparkctl.merge.merge import merge_checkpoint, prepare
from sparkctl.merge.updates import updates
from sparkctl.model.weights import INDEX, Checkpoint, TensorFile

LORA = Lora(r=4, alpha=6)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.dense(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def base(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A Qwen3.5 that may be changed."""
    return Path(shutil.copytree(qwen35_folder, tmp_path / "base"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a tensor, the last one shorter."""
    monkeypatch.setattr(merge, "BLOCK", 7 * 32)


@pytest.mark.usefixtures("small_blocks")
def test_adapters_are_added_in_fp32_and_rounded_once(base: Path, tmp_path: Path) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    merged = merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    before, after, halves = merging.tensors(base), merging.tensors(tmp_path / "out"), load_file(trained)
    assert sorted(merged.changed) == sorted({merging.base_name(name) for name in halves})
    twice = scaled = 0
    for name in merged.changed:
        a, b = (halves[name.removesuffix("weight") + f"lora_{x}.weight"] for x in "AB")
        exact = before[name].double() + LORA.alpha / LORA.r * (b.double() @ a.double())
        assert after[name].dtype == before[name].dtype
        assert merging.rounded_once(after[name], exact)
        # the same test sees a merge that rounds the update first, and one whose scale is 1 % off
        delta = (LORA.alpha / LORA.r * (b @ a)).to(before[name].dtype)
        twice += not merging.rounded_once(before[name] + delta, exact)
        off = before[name].float() + 1.01 * LORA.alpha / LORA.r * (b @ a)
        scaled += not merging.rounded_once(off.to(before[name].dtype), exact)
    assert twice == scaled == len(merged.changed)


def test_what_training_did_not_touch_is_the_bases_byte_for_byte(base: Path, tmp_path: Path) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    out = tmp_path / "out"
    changed = set(merge_checkpoint(base, trained, out, lora=LORA).changed)
    shards = {path.name for path in base.glob("*.safetensors")}
    assert {path.name for path in out.glob("*.safetensors")} == shards
    assert len(shards) >= 3
    kept = 0
    for name in shards:
        before, after = merging.raw(base / name), merging.raw(out / name)
        assert before.header == after.header
        for tensor, data in before.tensors.items():
            assert (after.tensors[tensor] == data) == (tensor not in changed), tensor
            kept += tensor not in changed
    assert kept + len(changed) == len(merging.tensors(base))
    floats = [n for n, t in merging.tensors(out).items() if t.dtype == torch.float32]
    assert any(n.endswith("A_log") for n in floats)
    assert any(n.endswith("linear_attn.norm.weight") for n in floats)


@pytest.mark.usefixtures("small_blocks")
def test_full_fine_tuning_rounds_the_masters_once(base: Path, tmp_path: Path) -> None:
    masters = merging.masters(base, tmp_path / "t.safetensors")
    merge_checkpoint(base, tmp_path / "t.safetensors", tmp_path / "out", lora=None)
    before, after = merging.tensors(base), merging.tensors(tmp_path / "out")
    for name, tensor in before.items():
        wanted = masters[name].to(tensor.dtype) if name in masters else tensor
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], wanted), name
    exact = [n for n, t in before.items() if t.dtype == torch.float32]
    assert exact
    assert all(torch.equal(after[n], masters[n]) for n in exact)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stored_head_follows_the_embedding_where_they_are_tied(
    family: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(dense(family), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tied = "lm_head.weight" not in tensors
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    masters = merging.masters(base, tmp_path / "t.safetensors", leave_out=("lm_head.weight",))
    merge_checkpoint(base, tmp_path / "t.safetensors", tmp_path / "out", lora=None)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert tied == (family == "llama")
    wanted = masters["model.embed_tokens.weight"].bfloat16() if tied else tensors["lm_head.weight"]
    assert torch.equal(after["lm_head.weight"], wanted)
    assert torch.equal(after["model.embed_tokens.weight"], masters["model.embed_tokens.weight"].bfloat16())


def test_a_tied_head_that_was_trained_apart_has_its_own_master(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers doesn't tie a stored head that differs from the embedding."""
    base = Path(shutil.copytree(dense("llama"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    head = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    masters = merging.masters(base, tmp_path / "t.safetensors")
    merge_checkpoint(base, tmp_path / "t.safetensors", tmp_path / "out", lora=None)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[name], masters[name].bfloat16()), name


@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("text", [True, False])
def test_which_key_ties_a_head_of_a_multimodal_model(
    base: Path, tmp_path: Path, outer: bool | None, text: bool
) -> None:
    """That of the part that is trained; transformers' class for it says whether there is a head to train."""
    from sparkctl.model.families import tied
    from sparkctl.model.load import load_text_model

    values = json.loads((base / "config.json").read_text())
    values["text_config"]["tie_word_embeddings"] = text
    values.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(values if outer is None else values | {"tie_word_embeddings": outer}))
    shard = base / "model-mtp.safetensors"
    head = merging.tensors(base)["model.language_model.embed_tokens.weight"].clone()
    save_file(load_file(shard) | {"lm_head.weight": head}, shard, metadata={"format": "pt"})
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard.name
    (base / INDEX).write_text(json.dumps(index))
    live = load_text_model(base, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (live.lm_head.weight is live.model.embed_tokens.weight) == text
    assert tied(json.loads((base / "config.json").read_text())) == text
    masters = merging.masters(base, tmp_path / "t.safetensors", leave_out=("lm_head.weight",))
    after = updates(tmp_path / "t.safetensors", Checkpoint(base), None, tied=text)
    assert ("lm_head.weight" in after) == text
    changes = prepare(base, tmp_path / "t.safetensors", None)[1]
    assert set(changes) == set(masters) | ({"lm_head.weight"} if text else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_stays_one_and_gives_the_trained_models_logits(
    family: str, dense: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, out = dense(family), tmp_path / "out"
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    merge_checkpoint(base, trained, out, lora=LORA)
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]
    merging.assert_same_model("AutoModelForCausalLM", base, trained, out, LORA, caplog)


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_both_classes_load_it_without_a_warning_and_give_the_trained_models_logits(
    kind: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    merging.assert_same_model(kind, base, trained, tmp_path / "out", LORA, caplog)


def test_the_index_counts_its_bytes_and_names_every_tensor(base: Path, tmp_path: Path) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    index_path = base / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    total = sum(tensor.nbytes for tensor in merging.tensors(base).values())
    for stated in (total, 5):
        index_path.write_text(json.dumps({**index, "metadata": {"total_size": stated, "by": "them"}}))
        merge_checkpoint(base, trained, tmp_path / f"out{stated}", lora=LORA)
        written = json.loads((tmp_path / f"out{stated}" / index_path.name).read_text())
        assert written == {**index, "metadata": {"total_size": total, "by": "them"}}
    assert (tmp_path / f"out{total}" / index_path.name).read_bytes() != index_path.read_bytes()
    index_path.write_text(json.dumps({**index, "metadata": {"total_size": total, "by": "them"}}))
    merge_checkpoint(base, trained, tmp_path / "same", lora=LORA)
    assert (tmp_path / "same" / index_path.name).read_bytes() == index_path.read_bytes()


def test_a_leftover_single_file_beside_an_index_is_refused(base: Path, tmp_path: Path) -> None:
    """It may be what was trained on: transformers would take it for the model."""
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    save_file({"model.language_model.norm.weight": torch.zeros(3)}, base / "model.safetensors")
    with pytest.raises(SparkError, match="holds two models"):
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    assert not (tmp_path / "out").exists()


def test_the_small_files_come_along_and_no_code_does(base: Path, tmp_path: Path) -> None:
    brought = ["preprocessor_config.json", "merges.txt", "LICENSE", "additional_chat_templates/tool_use.jinja"]
    left = ["modeling.py", "pytorch_model.bin", "x.pt", ".hidden.json", "README.md", "adapter_config.json"]
    (base / "additional_chat_templates").mkdir()
    for name in (*brought, *left):
        (base / name).write_text(f"content of {name}")
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    template = (base / "chat_template.jinja").read_text()
    merge_checkpoint(base, trained, tmp_path / "out", lora=LORA, template=template)
    for name in (*brought, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert not [name for name in left if (tmp_path / "out" / name).exists()]


def test_the_runs_own_template_takes_the_place_of_the_bases(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (base / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    merge_checkpoint(base, trained, tmp_path / "out", lora=LORA, template="{{ 'own' }}\n\n")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"{{ 'own' }}\n\n"
    assert not (tmp_path / "out" / "chat_template.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "own\n"


@pytest.mark.parametrize("dropped", ["mtp.fc.weight", "model.visual.blocks.0.norm1.weight"])
def test_a_tensor_that_config_promises_and_nobody_wrote_keeps_the_folder_nameless(
    dropped: str, base: Path, tmp_path: Path
) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    merging.drop(base, dropped)
    with pytest.raises(SparkError, match=dropped):
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "t.safetensors"]


def test_a_merge_that_loses_a_tensor_on_the_way_is_caught(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    write = merge.write_weights

    def lossy(checkpoint: Any, changes: Any, out: Path, task: Any) -> None:
        write(checkpoint, changes, out, task)
        merging.drop(out, "mtp.norm.weight")

    monkeypatch.setattr(merge, "write_weights", lossy)
    with pytest.raises(SparkError, match=r"mtp\.norm\.weight"):
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    assert not (tmp_path / "out").exists()


UP = "layers.0.mlp.up_proj.lora_A"
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {n.replace("layers.0", "layers.9"): v for n, v in t.items()}, "layers.9"),
        (lambda t: {n: v for n, v in t.items() if UP not in n}, UP),
        (lambda t: {n: (v[:, :-1] if UP in n else v) for n, v in t.items()}, "layers.0.mlp.up_proj.weight"),
        (lambda t: {n: (v[:2] if UP in n else v) for n, v in t.items()}, "rank 4"),
        (lambda t: {n: (v * torch.nan if UP in n else v) for n, v in t.items()}, "not finite"),
        (lambda t: {**t, "stray": torch.zeros(1)}, "stray"),
    ],
)
def test_adapters_that_do_not_fit_are_named(
    change: Callable[[Tensors], Tensors], named: str, base: Path, tmp_path: Path
) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    save_file({n: t.contiguous() for n, t in change(load_file(trained)).items()}, trained)
    with pytest.raises(SparkError, match=named):
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    assert not (tmp_path / "out").exists()


def test_what_rounding_makes_infinite_is_refused(base: Path, tmp_path: Path) -> None:
    masters = merging.masters(base, tmp_path / "t.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    masters[name][0, 0] = 3.4e38  # fp32 holds it, bf16 ends at 3.39e38
    save_file(masters, tmp_path / "t.safetensors")
    with pytest.raises(SparkError, match=f"`{name}` is not finite: NaN, or too large for BF16"):
        merge_checkpoint(base, tmp_path / "t.safetensors", tmp_path / "out", lora=None)


def test_a_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        quantised = {n: t.to(torch.float8_e4m3fn) if n.endswith("up_proj.weight") else t for n, t in tensors.items()}
        save_file(quantised, shard)
    with pytest.raises(SparkError, match="F8_E4M3"):
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)


def test_logging_is_where_a_warning_would_be_seen(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The check above can fail: a checkpoint with a tensor too few makes transformers say so."""
    merging.drop(base, "model.language_model.norm.weight")
    with merging.heard(caplog), pytest.raises(AssertionError, match="missing_keys"):
        merging.load("AutoModelForCausalLM", base)
    assert caplog.records


@pytest.mark.parametrize("what", ["a companion", "the weights"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_file_that_may_not_grow_is_said_with_its_place(base: Path, tmp_path: Path, what: str, kind: str) -> None:
    """As under `ulimit -f`, or on a full disk: nothing is left."""
    trained, out = merging.adapters(base, tmp_path / "t.safetensors", LORA), tmp_path / "out"
    most = max((base / name).stat().st_size for name in companions(base)) if what == "the weights" else 100
    assert what != "the weights" or most < trained.stat().st_size, "the limit would not be met"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    adapter = partial(write_adapter, kind="text", source="base", revision=None)
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            (merge_checkpoint if kind == "model" else adapter)(base, trained, out, lora=LORA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "t.safetensors"]


def test_a_read_that_fails_in_a_merge_is_not_laid_on_its_target(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = merging.adapters(base, tmp_path / "t.safetensors", LORA)

    def copy(file: TensorFile, *arguments: Any) -> None:
        file.path = Path("/proc/self/mem")  # whose first bytes really cannot be read
        list(file.pieces(next(iter(file.names()))))

    monkeypatch.setattr(TensorFile, "copy_bytes", copy)
    with pytest.raises(OSError, match="Input/output error") as caught:
        merge_checkpoint(base, trained, tmp_path / "out", lora=LORA)
    assert caught.value.filename == "/proc/self/mem"
