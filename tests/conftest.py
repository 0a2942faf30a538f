"""Fixtures that several folders use; the makers of models and data are in tests/tiny.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def qwen35_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal Qwen3.5. Read only: copy it before changing a file."""
    return tiny.qwen35(tmp_path_factory.mktemp("qwen35"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama. Read only."""
    return tiny.dense(tmp_path_factory.mktemp("llama"))
