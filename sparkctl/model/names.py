"""One model, three sets of names: live (the text-only class), the checkpoint's, and the adapters', which are its too.

A multimodal checkpoint keeps its text layers under `model.language_model.`, a text-only one under `model.` as the live
class does; `lm_head.weight` is called so everywhere. Which it is shows in the checkpoint's own names: transformers
saves a text-only model that came from a multimodal checkpoint under the longer ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparkctl.errors import SparkError
from sparkctl.model.anew import folder_anew
from sparkctl.model.weights import Checkpoint

LIVE, NESTED = "model.", "model.language_model."
WRAPPER = ".base_layer"  # what peft puts between an adapted module and its weight


class NameMap:
    """The names of `base`, a model that `load_text_model` gave, with or without peft's adapters in it.

    It knows its folder, whose headers are read here.
    """

    def __init__(self, base: Any) -> None:
        self._checkpoint = Checkpoint(Path(base.name_or_path))
        self._nested = text_prefix(self._checkpoint.names()) == NESTED

    def checkpoint(self, live: str) -> str:
        """The checkpoint's tensor of a live parameter. Raises SparkError where it has none."""
        name = live.replace(WRAPPER, "")
        name = nested_name(name) if self._nested else name
        if name not in self._checkpoint.names():
            folder = self._checkpoint.folder
            raise SparkError(f"`{folder}` has no `{name}` for the model's `{live}`", folder_anew(folder))
        return name

    def module(self, live: str) -> str:
        """The checkpoint's path of a live module that has a weight: the name of its adapter."""
        return self.checkpoint(f"{live}.weight").removesuffix(".weight")


def text_prefix(names: Iterable[str]) -> str:
    """What the text model's tensors begin with among `names`."""
    return NESTED if any(name.startswith(NESTED) for name in names) else LIVE


def nested_name(live: str) -> str:
    """A text-only class's name as multimodal checkpoints have it."""
    return NESTED + live.removeprefix(LIVE) if live.startswith(LIVE) else live


def live_name(name: str) -> str:
    """A checkpoint's name as the text-only class has it; those of other parts come back as they are."""
    return LIVE + name.removeprefix(NESTED) if name.startswith(NESTED) else name
