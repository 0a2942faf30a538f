"""`sparkctl bench mtp`: the training of an MTP head by several stacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkctl.cli import console, timings
from sparkctl.cli.options import JsonOpt


def add(group: typer.Typer) -> None:
    """Add it to `bench`."""
    group.command()(mtp)


def mtp(
    shape: Annotated[
        str, typer.Option("--shape", help="A published shape, random weights made on the device.")
    ] = "qwen3.5-2b",
    pack: Annotated[int, typer.Option("--pack", min=16, help="Tokens of a pack.")] = 8192,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents in the pack.")] = 12,
    steps: Annotated[int, typer.Option("--steps", min=1, max=8, help="Draft steps.")] = 3,
    stacks: Annotated[
        str,
        typer.Option(
            "--stacks", help="With commas: transformers, transformers-direct, native. Ratios are to the first."
        ),
    ] = "transformers,native",
    model: Annotated[Path | None, typer.Option("--model", help="The shape of this model folder instead.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Lengths and labels of a pack of this run.")] = None,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Micro-steps to time.")] = 20,
    json: JsonOpt = False,
) -> None:
    """A micro-step of `mtp train` by several stacks: the frozen model forward, the head forward and backward."""
    from sparkctl.bench.mtp import mtp_setting
    from sparkctl.bench.step import bench_step

    at = mtp_setting(shape=shape, pack=pack, documents=documents, draft_steps=steps, model=model, run=run)
    names = [name.strip() for name in stacks.split(",") if name.strip()]
    progress = console.progress()
    timings.answer(at, bench_step(at, names, steps=calls, progress=progress), json=json, progress=progress)
