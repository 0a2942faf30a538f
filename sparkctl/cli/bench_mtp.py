"""`sparkctl bench mtp`: the training of an MTP head by several stacks."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkctl.cli import console, timings
from sparkctl.cli.bench_options import DocumentsOpt, ModelOpt, PackOpt, RunOpt, ShapeOrRunOpt, names
from sparkctl.cli.options import JsonOpt


def add(group: typer.Typer) -> None:
    """Add it to `bench`."""
    group.command()(mtp)


def mtp(
    shape: ShapeOrRunOpt = None,
    pack: PackOpt = 8192,
    documents: DocumentsOpt = 12,
    steps: Annotated[int, typer.Option("--steps", min=1, max=8, help="Draft steps.")] = 3,
    stacks: Annotated[
        str,
        typer.Option(
            "--stacks", help="With commas: transformers, transformers-direct, native. Ratios are to the first."
        ),
    ] = "transformers,native",
    model: ModelOpt = None,
    run: RunOpt = None,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Micro-steps to time.")] = 20,
    json: JsonOpt = False,
) -> None:
    """A micro-step of `mtp train` by several stacks: the frozen model forward, the head forward and backward."""
    from sparkctl.bench.mtp import mtp_setting
    from sparkctl.bench.step import bench_step

    at = mtp_setting(shape=shape, pack=pack, documents=documents, draft_steps=steps, model=model, run=run)
    progress = console.progress()
    rows = bench_step(at, names(stacks), steps=calls, progress=progress)
    timings.answer(at, rows, json=json, progress=progress)
