"""A base that is not what its config.json promises, which is refused before it is trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import heads
import pytest
from vllm_heads import without

from sparkctl import telling
from sparkctl.errors import SparkError
from sparkctl.model import promise
from sparkctl.model.audit import audit
from sparkctl.steps.bases import require_whole


@pytest.mark.parametrize(
    ("lost", "hinted"), [("mtp.norm.weight", True), ("model.language_model.layers.0.mlp.up_proj.weight", False)]
)
def test_a_base_that_is_not_whole(qwen35_folder: Path, tmp_path: Path, lost: str, hinted: bool) -> None:
    require_whole(qwen35_folder)
    with pytest.raises(SparkError) as caught:
        require_whole(without(qwen35_folder, tmp_path / "base", lost))
    assert caught.value.message.endswith(f"config.json promises `{lost}`, and it is missing")
    assert caught.value.hint
    assert ("without its MTP head" in caught.value.hint) == hinted


def test_a_head_of_other_sizes_is_not_a_head_that_was_lost(qwen35_folder: Path, tmp_path: Path) -> None:
    """The hint about transformers' own saving is for the one alone."""
    base = heads.configured(Path(shutil.copytree(qwen35_folder, tmp_path / "base")), hidden_size=48)
    with pytest.raises(SparkError, match=r"config\.json promises") as caught:
        require_whole(base)
    assert "`mtp." in "".join(audit(base))
    assert "without its MTP head" not in (caught.value.hint or "")


def test_a_training_imports_what_it_needs_once(qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own would import transformers for 4 s, and the training then once more."""
    monkeypatch.setattr(promise, "imported", lambda: False)
    monkeypatch.setattr(telling, "beside", lambda *_, **__: pytest.fail("another process"))
    require_whole(qwen35_folder)
