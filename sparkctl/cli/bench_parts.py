"""`sparkctl bench kernels`, `products` and `synthetic`: single operators, single products, a dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparkctl.cli import arriving, console, measured, timings
from sparkctl.cli.options import JsonOpt
from sparkctl.manifest.table import Mode

if TYPE_CHECKING:
    from sparkctl.bench.products import Row

ShapeOpt = Annotated[str, typer.Option("--shape", help="A published shape, random weights made on the device.")]
ModelOpt = Annotated[Path | None, typer.Option("--model", help="The shape of this model folder instead.")]
ModeOpt = Annotated[Mode, typer.Option("--mode", help="lora or full fine-tuning.")]
TrainedOpt = Annotated[
    Literal["lora", "full", "mtp"], typer.Option("--mode", help="lora or full fine-tuning, or the MTP head's training.")
]
TokensOpt = Annotated[int, typer.Option("--tokens", min=16, help="Tokens of the pack.")]
DocumentsOpt = Annotated[int, typer.Option("--documents", min=1, help="Documents in the pack.")]
RankOpt = Annotated[int, typer.Option("--rank", min=1, help="LoRA rank.")]


def add(group: typer.Typer) -> None:
    """Add the three to `bench`."""
    for command in (kernels, products, synthetic):
        group.command()(command)


def kernels(
    shape: ShapeOpt = "qwen3.5-2b",
    model: ModelOpt = None,
    tokens: TokensOpt = 5376,
    documents: DocumentsOpt = 12,
    operators: Annotated[str | None, typer.Option("--operators", help="Names, with commas; else all.")] = None,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Calls to time.")] = 20,
    library: Annotated[bool, typer.Option("--library/--no-library", help="Time a library's version beside it.")] = True,
    json: JsonOpt = False,
) -> None:
    """Each operator, checked first, beside plain torch, a library's version and what the machine can do at best."""
    from sparkctl.bench.kernels import bench_kernels
    from sparkctl.bench.setting import setting

    at = setting(shape=shape, mode="lora", pack=tokens, documents=documents, model=model)
    names = [name.strip() for name in (operators or "").split(",") if name.strip()]
    progress = console.progress()
    found = bench_kernels(at, names, calls=calls, library=library, progress=progress)
    rows = arriving.answer(
        found, measured.kernel_line, partial(measured.kernels_json, at), partial(measured.kernels_table, at), json=json,
        progress=progress,
    )  # fmt: skip
    if any(row.right is False for row in rows):
        raise typer.Exit(1)


def products(
    shape: ShapeOpt = "qwen3.5-2b",
    model: ModelOpt = None,
    mode: TrainedOpt = "lora",
    tokens: TokensOpt = 5376,
    rank: RankOpt = 128,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Trainings on this machine take the best.")] = True,
    json: JsonOpt = False,
) -> None:
    """Each matrix product of a step by every way to compute it; trainings that start here later take the fastest."""
    from sparkctl.bench.mtp import mtp_setting
    from sparkctl.bench.products import bench_products
    from sparkctl.bench.setting import DOCUMENTS, setting

    documents = min(DOCUMENTS, tokens // 2)
    if mode == "mtp":
        at = mtp_setting(shape=shape, pack=tokens, documents=documents, model=model)
    else:
        at = setting(shape=shape, mode=mode, pack=tokens, documents=documents, model=model, rank=rank)
    progress, kept = console.progress(), False

    def work(tell: Callable[[Row], None]) -> None:
        nonlocal kept
        _, kept = bench_products(at, keep=keep, tell=tell, progress=progress)

    arriving.told(
        work, _product_line, lambda rows: measured.products_json(at, rows, kept),
        lambda rows: measured.products_table(at, rows, kept), json=json, progress=progress,
    )  # fmt: skip


def _product_line(row: Row) -> str:
    """gemm nt 6144x8192x2432: halves, 1.08 times torch's rate."""
    return f"{row.name}: {row.timed.best}" + (f", {row.speedup:.2f} times torch's rate" if row.speedup > 1 else "")


def synthetic(
    mode: ModeOpt = "lora",
    pack: Annotated[int, typer.Option("--pack", min=16, help="Tokens of a pack.")] = 5376,
    documents: DocumentsOpt = 12,
    stacks: Annotated[
        str | None, typer.Option("--stacks", help="Names, with commas; ratios are to the first. Else all installed.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Micro-steps to time.")] = 20,
    json: JsonOpt = False,
) -> None:
    """28 dense layers without GatedDeltaNet by several stacks: the published recipe's upper bound."""
    from sparkctl.bench.step import bench_step, installed
    from sparkctl.bench.synthetic import synthetic_setting

    progress, at = console.progress(), synthetic_setting(mode, pack, documents)
    names, absent = installed()
    if stacks is not None:
        names = [name.strip() for name in stacks.split(",") if name.strip()]
    elif absent:
        progress.say(f"left out, not installed: {', '.join(absent)}")
    rows = bench_step(at, names, steps=steps, progress=progress)
    timings.answer(at, rows, measured.synthetic_json, measured.synthetic_table, json=json, progress=progress)
