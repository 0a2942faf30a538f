"""`bench mtp`: one micro-step of the MTP head's training by several stacks, each in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparkctl.bench.setting import DOCUMENTS, Setting, setting
from sparkctl.errors import OtherOptions
from sparkctl.model import catalog, mtp

PACK = 8192
COMPARED = ("transformers", "native")


def mtp_setting(
    *, shape: str | None = None, pack: int = PACK, documents: int = DOCUMENTS, draft_steps: int = 3,
    model: Path | None = None, run: Path | None = None,
) -> Setting:  # fmt: skip
    """The pack, and the model whose head is trained. Raises UsageError where its config promises none."""
    at = setting(shape=shape, mode="full", pack=pack, documents=documents, model=model, run=run)
    if not mtp.layers(at.work.text):
        raise OtherOptions(f"`{at.name}` has no MTP head", model=None, shape=catalog.BENCHED)
    return replace(at, work=replace(at.work, draft_steps=draft_steps))
