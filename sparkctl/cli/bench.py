"""`sparkctl bench`: what it measures and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkctl.cli import bench_mtp, bench_parts, console, predictions, timings
from sparkctl.cli.options import JsonOpt
from sparkctl.manifest.table import Mode

group = typer.Typer(
    help="Measure this machine: `step`, a training step by several stacks; `kernels`, its operators; `products`, its "
    "matrix products; `synthetic`, a dense model; `mtp`, the training of an MTP head; `predict`, another machine's."
)

ShapeOpt = Annotated[str, typer.Option("--shape", help="A published shape, random weights made on the device.")]
ModeOpt = Annotated[Mode, typer.Option("--mode", help="lora or full fine-tuning.")]
PackOpt = Annotated[int, typer.Option("--pack", min=16, help="Tokens of a pack.")]


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
    shape: ShapeOpt = "qwen3.5-2b",
    mode: ModeOpt = "lora",
    pack: PackOpt = 5376,
    stacks: Annotated[
        str | None, typer.Option("--stacks", help="Names, with commas; ratios are to the first. Else all installed.")
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents in the pack.")] = 12,
    model: Annotated[Path | None, typer.Option("--model", help="The shape of this model folder instead.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Lengths and labels of a pack of this run.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Micro-steps to time.")] = 20,
    cold: Annotated[bool, typer.Option("--cold", help="Time a start with empty kernel caches too.")] = False,
    json: JsonOpt = False,
) -> None:
    """Forward and backward of one pack by several stacks, each in a process of its own."""
    from sparkctl.bench.setting import setting
    from sparkctl.bench.step import bench_step, installed

    progress = console.progress()
    at = setting(
        shape=shape, mode=mode, pack=pack, documents=documents, model=model, run=run, checkpointing=checkpointing
    )
    names, absent = installed()
    if stacks is not None:
        names = [name.strip() for name in stacks.split(",") if name.strip()]
    elif absent:
        progress.say(f"left out, not installed: {', '.join(absent)}")
    rows = bench_step(at, names, steps=steps, cold=cold, progress=progress)
    timings.answer(at, rows, json=json, progress=progress)


@group.command()
def predict(
    device: Annotated[str, typer.Option("--device", help="gb10, h100 or h200.")] = "gb10",
    shape: ShapeOpt = "qwen3.5-2b",
    mode: ModeOpt = "lora",
    pack: PackOpt = 5376,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents in the pack.")] = 12,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    json: JsonOpt = False,
) -> None:
    """The native engine's step by roofline on a device that is not here: at best, a prediction."""
    from sparkctl.bench.predict import predict as work

    found = work(device, shape, mode, pack, documents, checkpointing)
    console.answer(predictions.as_json(found), predictions.as_table(found), json=json)
