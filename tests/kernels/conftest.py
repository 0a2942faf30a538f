"""What tests on a GPU share: a model, and the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test held on a GPU goes back after it: six processes that keep theirs fill 140 GB."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def wide_qwen35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 of four layers with the real head dims."""
    import tiny

    return tiny.hybrid(
        tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512, head_dim=256, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_num_key_heads=2, linear_num_value_heads=4, partial_rotary_factor=0.25,
        mrope_section=[11, 11, 10],
    )  # fmt: skip
