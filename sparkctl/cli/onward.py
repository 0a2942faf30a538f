"""How the steps of a run end: with what they found, and the command that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from sparkctl.cli import console


def answer(run: Path, data: dict[str, Any], human: RenderableType, *, json: bool, more: bool) -> None:
    """A step's answer, and the next step of its run where `more` is to come; a dry run leaves it at the same step."""
    from sparkctl.steps.show import next_command

    then = next_command(run) if more else None
    console.answer({**data, "next": then}, Group(human, *lines([then] if then else [])), json=json)


def lines(commands: Sequence[str]) -> list[Text]:
    """The commands that come next, each whole on a line of its own, to be copied; nothing where there are none."""
    return [Text("\nnext: " + "\n      ".join(commands))] if commands else []
