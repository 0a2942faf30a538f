"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import formats
import pytest
from chatting import TEMPLATES

from sparkctl.data.chat import ChatFormat


@pytest.fixture(scope="session")
def chat_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder for each template; Mistral's has pieces, the others bytes. Read only."""
    root = tmp_path_factory.mktemp("formats")
    makers = {"mistral": formats.sentence_piece}
    return {
        name: makers.get(name, formats.byte_level)(root / name, template, eos)
        for name, (template, eos) in TEMPLATES.items()
    }


@pytest.fixture(scope="session")
def chats(chat_folders: dict[str, Path]) -> dict[str, ChatFormat]:
    """The chat formats of those folders."""
    return {name: ChatFormat.load(folder) for name, folder in chat_folders.items()}
