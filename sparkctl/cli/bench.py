"""`sparkctl bench`: what it measures and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkctl.cli import bench_mtp, bench_options, bench_parts, console, predictions, timings
from sparkctl.cli.bench_options import (
    CheckpointingOpt,
    DocumentsOpt,
    ModelOpt,
    ModeOpt,
    PackOpt,
    RunOpt,
    ShapeOpt,
    ShapeOrRunOpt,
    StacksOpt,
    StepsOpt,
)
from sparkctl.cli.options import JsonOpt
from sparkctl.model.catalog import BENCHED

group = typer.Typer(
    help="Measure this machine: `step`, a training step by several stacks; `kernels`, its operators; `products`, its "
    "matrix products; `synthetic`, a dense model; `mtp`, the training of an MTP head; `predict`, another machine's."
)


def register(app: typer.Typer) -> None:
    """Add the command and its parts."""
    bench_parts.add(group)
    bench_mtp.add(group)
    app.add_typer(group, name="bench")


@group.callback(invoke_without_command=True)
def bench(ctx: typer.Context) -> None:
    """Measure this machine; alone, `step`."""
    if ctx.invoked_subcommand is None:
        step()


@group.command()
def step(
    shape: ShapeOrRunOpt = None,
    mode: ModeOpt = "lora",
    pack: PackOpt = 5376,
    stacks: StacksOpt = None,
    documents: DocumentsOpt = 12,
    model: ModelOpt = None,
    run: RunOpt = None,
    checkpointing: CheckpointingOpt = False,
    steps: StepsOpt = 20,
    cold: Annotated[bool, typer.Option("--cold", help="Time a start with empty kernel caches too.")] = False,
    json: JsonOpt = False,
) -> None:
    """Forward and backward of one pack by several stacks, each in a process of its own."""
    from sparkctl.bench.setting import setting
    from sparkctl.bench.step import bench_step

    progress = console.progress()
    at = setting(
        shape=shape, mode=mode, pack=pack, documents=documents, model=model, run=run, checkpointing=checkpointing
    )
    rows = bench_step(at, bench_options.stacks(stacks, progress), steps=steps, cold=cold, progress=progress)
    timings.answer(at, rows, json=json, progress=progress)


@group.command()
def predict(
    device: Annotated[str, typer.Option("--device", help="gb10, h100 or h200.")] = "gb10",
    shape: ShapeOpt = BENCHED,
    mode: ModeOpt = "lora",
    pack: PackOpt = 5376,
    documents: DocumentsOpt = 12,
    checkpointing: CheckpointingOpt = False,
    json: JsonOpt = False,
) -> None:
    """The native engine's step by roofline on a device that is not here: at best, a prediction."""
    from sparkctl.bench.predict import predict as work

    found = work(device, shape, mode, pack, documents, checkpointing)
    console.answer(predictions.as_json(found), predictions.as_table(found), json=json)
