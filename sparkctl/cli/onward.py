"""How the steps of a run end: with what they found, and the command that comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from sparkctl.cli import console


def answer(run: Path, data: dict[str, Any], human: RenderableType, *, json: bool, more: bool) -> None:
    """A step's answer, and the next step of its run where `more` is to come; a dry run leaves it at the same step."""
    from sparkctl.steps.show import next_command

    then = next_command(run) if more else None
    line = [Text(f"\nnext: {then}")] if then else []
    console.answer({**data, "next": then}, Group(human, *line), json=json)
