"""The options that parts of `sparkctl bench` share, and the stacks that one of them names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkctl.manifest.table import Mode
from sparkctl.model.catalog import BENCHED
from sparkctl.progress import Progress

STACKS = "stock, peft-fla, unsloth, unsloth-default and native"

ShapeOpt = Annotated[str, typer.Option("--shape", help="A published shape, random weights made on the device.")]
ShapeOrRunOpt = Annotated[
    str | None, typer.Option("--shape", help=f"A published shape, random weights; else {BENCHED}, or the run's model.")
]
ModelOpt = Annotated[
    Path | None, typer.Option("--model", help="This model folder instead; random weights where it has none.")
]
RunOpt = Annotated[
    Path | None,
    typer.Option("--run", help="Lengths and labels of a pack of this run, and on a GPU its model where none is named."),
]
ModeOpt = Annotated[Mode, typer.Option("--mode", help="lora or full fine-tuning.")]
PackOpt = Annotated[int, typer.Option("--pack", min=16, help="Tokens of a pack.")]
DocumentsOpt = Annotated[int, typer.Option("--documents", min=1, help="Documents in the pack.")]
StepsOpt = Annotated[int, typer.Option("--steps", min=1, help="Micro-steps to time.")]
CheckpointingOpt = Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")]
StacksOpt = Annotated[
    str | None,
    typer.Option(
        "--stacks",
        help=f"Of {STACKS}, with commas; ratios are to the first. Else all that are here, without unsloth-default.",
    ),
]


def names(text: str | None) -> list[str]:
    """The names in it, which commas part."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def stacks(asked: str | None, progress: Progress) -> list[str]:
    """Those that are asked for, else those that are installed; what is not is said."""
    from sparkctl.bench.step import installed

    if asked is not None:
        return names(asked)
    here, absent = installed()
    if absent:
        progress.say(f"left out, not installed: {', '.join(absent)}")
    return here
