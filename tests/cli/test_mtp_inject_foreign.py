"""`sparkctl mtp inject --into` a folder of another tool's, which is not as tidy as a merged one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import heads
import merging
import pytest
from injecting import DEFAULT, Said, captured, inject, merged, refused  # noqa: F401  # fixtures too
from safetensors.torch import load_file, save_file

from sparkctl.manifest.store import Run
from sparkctl.model.audit import audit
from sparkctl.model.weights import INDEX

INTO = (*DEFAULT, "--into", "other")


@pytest.fixture(name="other")
def foreign(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A whole model, its head in a shard of its own."""
    return Path(shutil.copytree(qwen35_folder, tmp_path / "other"))


def indexed(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the index."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("metadata", [["what a tool wrote"], "total", None])
def test_metadata_of_any_kind_in_the_index(metadata: object, run: Run, other: Path) -> None:
    indexed(other, lambda index: index.update(metadata=metadata))
    inject(*INTO)
    found = json.loads(Path("r1/served", INDEX).read_text())["metadata"]
    assert list(found) == ["total_size"]


def test_a_card_in_another_encoding_keeps_its_bytes(run: Run, other: Path) -> None:
    (other / "README.md").write_bytes(b"# Mod\xe8le\n\ncaf\xe9\n")
    inject(*INTO)
    card = Path("r1/served/README.md").read_bytes()
    assert card.startswith(b"# Mod\xe8le\n\ncaf\xe9\n")
    assert b"## MTP head" in card


@pytest.mark.parametrize("lost", ["its shard", "its tensors"])
def test_an_index_that_still_names_a_lost_head(lost: str, run: Run, other: Path) -> None:
    """A tool that copies the base's index beside weights that transformers saved."""
    body = {name: value for name, value in merging.tensors(other).items() if not name.startswith("mtp.")}
    (other / "model-mtp.safetensors").unlink()
    if lost == "its tensors":
        shard = sorted(other.glob("*-of-*.safetensors"))[0].name
        indexed(other, lambda index: index["weight_map"].update(dict.fromkeys(heads.WANTED, shard)))
    inject(*INTO)
    served = Path("r1/served")
    assert audit(served) == []
    assert heads.equal(heads.own(served), heads.own(Path("base")))
    assert heads.equal(merging.tensors(served), body | heads.own(Path("base")))


def test_a_link_that_leads_nowhere_is_a_missing_shard(run: Run, said: Said, other: Path) -> None:
    shard = sorted(other.glob("*-of-*.safetensors"))[0]
    shard.unlink()
    os.symlink("../blobs/gone", shard)
    assert f"`other/{shard.name}`, which the index names, is missing" in refused(said, 1, *INTO)


def test_names_that_no_loader_knows_are_counted_and_not_all_told(run: Run, said: Said, other: Path) -> None:
    def renamed(tensors: dict) -> dict:
        return {
            name.replace("model.language_model.", "language_model.model."): value for name, value in tensors.items()
        }

    for shard in other.glob("*.safetensors"):
        save_file(renamed(load_file(shard)), shard, metadata={"format": "pt"})
    indexed(other, lambda index: index.update(weight_map=renamed(index["weight_map"])))
    text = refused(said, 1, *INTO)
    assert "`model.language_model.embed_tokens.weight`" in text
    assert " more\n" in text
    assert len(text) < 1200
