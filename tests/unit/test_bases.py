"""A base that is not what its config.json promises, which is refused before it is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_heads import without

from sparkctl.errors import SparkError
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
