"""`sparkctl bench kernels`, `products` and `synthetic`: single operators, single products, a dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparkctl.cli import arriving, bench_options, console, measured, timings
from sparkctl.cli.bench_options import DocumentsOpt, ModelOpt, ModeOpt, PackOpt, ShapeOpt, StacksOpt, StepsOpt
from sparkctl.cli.options import JsonOpt
from sparkctl.model.catalog import BENCHED

if TYPE_CHECKING:
    from sparkctl.bench.products import Row

TrainedOpt = Annotated[
    Literal["lora", "full", "mtp"], typer.Option("--mode", help="lora or full fine-tuning, or the MTP head's training.")
]
TokensOpt = Annotated[int, typer.Option("--tokens", min=16, help="Tokens of the pack.")]
RankOpt = Annotated[int, typer.Option("--rank", min=1, help="LoRA rank.")]


def add(group: typer.Typer) -> None:
    """Add the three to `bench`."""
    for command in (kernels, products, synthetic):
        group.command()(command)


def kernels(
    shape: ShapeOpt = BENCHED,
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
    progress = console.progress()
    found = bench_kernels(at, bench_options.names(operators), calls=calls, library=library, progress=progress)
    rows = arriving.answer(
        found, measured.kernel_line, partial(measured.kernels_json, at), partial(measured.kernels_table, at), json=json,
        progress=progress,
    )  # fmt: skip
    if any(row.right is False for row in rows):
        raise typer.Exit(1)


def products(
    shape: ShapeOpt = BENCHED,
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
    pack: PackOpt = 5376,
    documents: DocumentsOpt = 12,
    stacks: StacksOpt = None,
    steps: StepsOpt = 20,
    json: JsonOpt = False,
) -> None:
    """28 dense layers without GatedDeltaNet by several stacks: the published recipe's upper bound."""
    from sparkctl.bench.step import bench_step
    from sparkctl.bench.synthetic import synthetic_setting

    progress, at = console.progress(), synthetic_setting(mode, pack, documents)
    rows = bench_step(at, bench_options.stacks(stacks, progress), steps=steps, progress=progress)
    timings.answer(at, rows, measured.synthetic_json, measured.synthetic_table, json=json, progress=progress)
