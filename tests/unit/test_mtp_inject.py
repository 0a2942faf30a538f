"""A folder with a head in it: every byte of the body as it was, one head, an index and a config that say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import heads
import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError, UsageError
from sparkctl.merge.seal import SealedFile, sealed_files
from sparkctl.model import mtp
from sparkctl.model.audit import audit
from sparkctl.model.names import nested_name
from sparkctl.model.weights import INDEX, SINGLE
from sparkctl.mtp import inject
from sparkctl.mtp.inject import BODY_SHARD, HEAD_SHARD, inject_head, read_target
from sparkctl.mtp.source import from_file

Sealed = dict[str, SealedFile]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A trained head."""
    return heads.head_file(tmp_path / "trained" / "head.safetensors")


def injected(model: Path, head: Path, out: Path, **options: Any) -> Sealed:
    """The digests that were known at the end."""
    seen: list[Sealed] = []
    target = read_target(model)
    source = from_file(head, target.head)
    inject_head(target, source, out, known={}, finish=lambda stage, digests: seen.append(digests), **options)
    return seen[0]


def without_head(model: Path, out: Path) -> Path:
    """As transformers saves it: no head, and a config that promises none."""
    shutil.copytree(model, out)
    for name in heads.WANTED:
        merging.drop(out, name)
    (out / "model-mtp.safetensors").unlink()
    return heads.configured(out, mtp_num_hidden_layers=0)


KINDS = ("own shard", "lost", "mixed", "single", "text", "text, long names")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, qwen35_folder: Path, tmp_path: Path) -> Path:
    """What tools leave: with a head of its own, without, in one file or several, multimodal or text alone."""
    out = tmp_path / "model"
    if request.param == "own shard":
        return Path(shutil.copytree(qwen35_folder, out))
    if request.param == "lost":
        return without_head(qwen35_folder, out)
    if request.param in ("mixed", "single"):
        return heads.rebuilt(qwen35_folder, out, 3 if request.param == "mixed" else 1)
    tiny.hybrid(out)
    heads.configured(out, mtp_num_hidden_layers=0)
    if request.param == "text, long names":
        tensors = load_file(out / SINGLE)
        save_file({nested_name(name): t for name, t in tensors.items()}, out / SINGLE, metadata={"format": "pt"})
    return out


def body(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in merging.tensors(folder).items() if not name.startswith("mtp.")}


@pytest.mark.parametrize("link", [False, True])
def test_the_body_stays_and_the_head_is_there_once(model: Path, head: Path, link: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    digests = injected(model, head, out, link=link)
    assert heads.equal(body(out), body(model))
    assert heads.equal(heads.own(out), load_file(head))
    index = json.loads((out / INDEX).read_text())
    tensors = merging.tensors(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    held = [name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)]
    assert sorted(held) == sorted(tensors)  # nothing twice
    assert set(load_file(out / HEAD_SHARD)) == set(heads.WANTED)
    assert audit(out) == []
    config = json.loads((out / "config.json").read_text())
    assert mtp.layers(config.get("text_config", config)) == 1
    assert {name: file for name, file in sealed_files(out).items() if name in digests} == digests
    for path in out.glob("*.safetensors"):
        source = model / (SINGLE if path.name == BODY_SHARD else path.name)
        untouched = source.is_file() and path.name != HEAD_SHARD and source.read_bytes() == path.read_bytes()
        assert (path.name in digests) == (path.name != HEAD_SHARD)
        assert path.samefile(source) == (link and untouched) if untouched else path.stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_transformers_loads_it_silently(
    kind: str, qwen35_folder: Path, head: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says the same as before: the head is not its business."""
    single = heads.rebuilt(qwen35_folder, tmp_path / "single", 1)
    injected(single, head, tmp_path / "out")
    before = merging.load(kind, qwen35_folder)
    with merging.heard(caplog):
        after = merging.load(kind, tmp_path / "out")
    assert not caplog.records, caplog.text
    assert torch.equal(merging.logits(before), merging.logits(after))


def test_a_config_that_promises_already_is_left_byte_for_byte(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    injected(qwen35_folder, head, tmp_path / "out")
    names = {path.name for path in qwen35_folder.iterdir() if not path.name.endswith(("safetensors", "index.json"))}
    assert names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (qwen35_folder / name).read_bytes(), name


def test_a_shard_is_written_anew_with_its_header_and_without_the_head(
    qwen35_folder: Path, head: Path, tmp_path: Path
) -> None:
    mixed = heads.rebuilt(qwen35_folder, tmp_path / "mixed", 2)
    injected(mixed, head, tmp_path / "out")
    for path in mixed.glob("*.safetensors"):
        before, after = merging.raw(path), merging.raw(tmp_path / "out" / path.name)
        assert after.tensors == {n: data for n, data in before.tensors.items() if not n.startswith("mtp.")}
        assert b'"format":"pt"' in after.header


def test_links_that_cannot_be_made_are_copies(
    qwen35_folder: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    injected(qwen35_folder, head, tmp_path / "out", link=True)
    assert heads.equal(body(tmp_path / "out"), body(qwen35_folder))


def test_a_link_leads_to_the_file_and_not_to_a_link(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to the files, which a user may delete."""
    cached = tmp_path / "cached"
    cached.mkdir()
    for path in qwen35_folder.iterdir():
        (cached / path.name).symlink_to(path)
    injected(cached, head, tmp_path / "out", link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("link", [False, True])
def test_a_body_that_is_not_what_its_seal_says(qwen35_folder: Path, head: Path, link: bool, tmp_path: Path) -> None:
    target = read_target(qwen35_folder)
    name = target.shards[0].file.path.name
    wrong = {name: SealedFile(size=target.shards[0].bytes, sha256="0" * 64)}
    with pytest.raises(SparkError, match="is not what was written there") as raised:
        inject_head(
            target, from_file(head, target.head), tmp_path / "out", known=wrong, link=link, finish=lambda *_: None
        )
    assert raised.value.hint
    assert not (tmp_path / "out").exists()


def refused(tmp_path: Path, model: Path, head: Path) -> SparkError:
    """The error; nothing is left of the work."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SparkError) as raised:
        injected(model, head, tmp_path / "out")
    assert raised.value.hint
    assert sorted(tmp_path.iterdir()) == before
    return raised.value


def test_a_head_of_other_dimensions(qwen35_folder: Path, tmp_path: Path) -> None:
    wide = heads.head_file(tmp_path / "wide" / "head.safetensors", hidden=48)
    assert (
        "has other dimensions than the model: `mtp.fc.weight` [48, 96]"
        in refused(tmp_path, qwen35_folder, wide).message
    )


@pytest.mark.parametrize("dropped", ["mtp.fc.weight", "mtp.layers.0.self_attn.q_norm.weight"])
def test_a_head_that_is_not_whole(dropped: str, qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    save_file({name: tensor for name, tensor in load_file(head).items() if name != dropped}, head)
    assert f"is not whole: it lacks `{dropped}`" in refused(tmp_path, qwen35_folder, head).message


def test_a_head_that_is_lost_on_the_way_is_caught(
    qwen35_folder: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the audit of what was written, before it gets its name."""
    write = inject._write_head

    def lossy(source: Any, path: Path, task: Any) -> None:
        write(source, path, task)
        save_file({n: t for n, t in load_file(path).items() if n != "mtp.fc.weight"}, path)

    monkeypatch.setattr(inject, "_write_head", lossy)
    error = refused(tmp_path, qwen35_folder, head)
    assert "`mtp.fc.weight`" in error.message
    assert "bug" in (error.hint or "")


def test_a_head_with_a_value_that_is_no_number(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    tensors = load_file(head)
    tensors["mtp.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, head)
    assert "`mtp.layers.0.mlp.up_proj.weight`" in refused(tmp_path, qwen35_folder, head).message


def test_a_config_that_promises_two_layers(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    two = heads.configured(Path(shutil.copytree(qwen35_folder, tmp_path / "two")), mtp_num_hidden_layers=2)
    assert "promises 2 layers of MTP head" in refused(tmp_path, two, head).message
    own = heads.configured(two, mtp_num_hidden_layers=0, mtp_use_dedicated_embeddings=True)
    assert "embeddings of its own" in refused(tmp_path, own, head).message


def test_a_config_that_speaks_of_a_head_at_its_top(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    """vLLM looks there first."""
    top = Path(shutil.copytree(qwen35_folder, tmp_path / "top"))
    config = json.loads((top / "config.json").read_text())
    (top / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 2}))
    assert "promises 2 layers of MTP head" in refused(tmp_path, top, head).message
    (top / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 0}))
    injected(top, head, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"mtp_num_hidden_layers": 1}


def test_a_model_that_is_not_whole_itself(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(qwen35_folder, tmp_path / "broken"))
    merging.drop(broken, "model.language_model.norm.weight")
    error = refused(tmp_path, broken, head)
    assert "`model.language_model.norm.weight`" in error.message
    assert "is not whole either" in (error.hint or "")


def test_an_index_that_names_a_missing_shard(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(qwen35_folder, tmp_path / "broken"))
    shard = sorted(broken.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"`{shard}`, which the index names, is missing" in refused(tmp_path, broken, head).message


def test_models_that_take_no_head(llama_folder: Path, qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    assert "is of type `llama`, which takes no MTP head" in refused(tmp_path, llama_folder, head).message
    taken = Path(shutil.copytree(qwen35_folder, tmp_path / "taken"))
    merging.drop(taken, "model.language_model.norm.weight")
    norm = {"model.language_model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    save_file(norm | load_file(taken / HEAD_SHARD), taken / HEAD_SHARD)
    index = json.loads((taken / INDEX).read_text())
    index["weight_map"]["model.language_model.norm.weight"] = HEAD_SHARD
    (taken / INDEX).write_text(json.dumps(index))
    assert "give that file another name" in (refused(tmp_path, taken, head).hint or "")
    assert isinstance(refused(tmp_path, llama_folder, head), UsageError)


def reconfigured(folder: Path, **changes: Any) -> Path:
    """`folder` with other values at its config.json's top; None is written as null."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_config_that_does_not_describe_its_weights(qwen35_folder: Path, head: Path, tmp_path: Path) -> None:
    """The head is right: sizes that config.json leaves out are its type's."""
    undone = Path(shutil.copytree(qwen35_folder, tmp_path / "undone"))
    path = undone / "config.json"
    text = json.loads(path.read_text())["text_config"]
    del text["head_dim"]
    error = refused(tmp_path, reconfigured(undone, text_config=text), head)
    assert error.message == (
        f"`{path}` does not describe the weights beside it: `model.language_model.layers.3.self_attn.q_proj.weight` "
        "has shape [64, 32], and it says [1024, 32] (it leaves out head_dim, for which the type's default stands)"
    )
    assert str(path) in (error.hint or "")
    error = refused(tmp_path, reconfigured(undone, text_config=None), head)
    assert error.message.startswith(f"`{path}` does not describe the weights beside it: ")
    assert "(it leaves out text_config, " in error.message
    text = json.loads((qwen35_folder / "config.json").read_text())["text_config"] | {"intermediate_size": 65}
    error = refused(tmp_path, reconfigured(undone, text_config=text), head)
    assert error.message.endswith("layers.3.mlp.gate_proj.weight` has shape [64, 32], and it says [65, 32]")
