"""The trained model in the base checkpoint's own form: same shards, names, dtypes and headers, other numbers.

A shard is copied with its header; the byte ranges of the tensors that training reached are computed in fp32, a block
of rows at a time, and rounded once. So memory is bounded by a block whatever the model's size, and every byte that
training did not reach is the base's.
"""

# O rows of a tensor (its first axis) · I all its other axes flattened

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sparkctl.errors import SparkError
from sparkctl.files import naming, staged_folder
from sparkctl.manifest.schema import Lora
from sparkctl.merge.companions import copy_companions
from sparkctl.merge.updates import Update, another, listed, updates
from sparkctl.model.audit import audit
from sparkctl.model.families import tied
from sparkctl.model.promise import promising
from sparkctl.model.weights import INDEX, Checkpoint, TensorFile
from sparkctl.progress import Progress, Task, silent

BLOCK = 1 << 22  # elements computed at a time: 16 MB in fp32, three such buffers at once
SPARE = 64 << 20  # bytes of the target's file system that stay free: tokenizer, card, metadata


@dataclass(frozen=True)
class Merged:
    """What a merge is about to write, or wrote."""

    tensors: int
    changed: Sequence[str]
    bytes: int  # of the weights


def prepare(base: Path, trained: Path, lora: Lora | None) -> tuple[Checkpoint, dict[str, Update]]:
    """Base and updates, checked against each other. Raises SparkError where they do not fit."""
    checkpoint = Checkpoint(base)
    changes = updates(trained, checkpoint, lora, tied=tied(json.loads((base / "config.json").read_bytes())))
    odd = [f"{name} ({checkpoint.dtype(name)})" for name in changes if checkpoint.dtype(name) not in FLOATS]
    if odd:
        raise SparkError(
            f"the base stores tensors that were trained in a form that cannot be merged into: {listed(odd)}",
            "take the unquantised model as the base",
        )
    return checkpoint, changes


ELSEWHERE = "`--out FOLDER`"
FLOATS = ("BF16", "F16", "F32")


def describe(checkpoint: Checkpoint, changes: dict[str, Update]) -> Merged:
    """Counts of the merge."""
    size = sum(path.stat().st_size for path in checkpoint.shards())
    return Merged(len(checkpoint.names()), list(changes), size)


def merge_checkpoint(
    base: Path, trained: Path, out: Path, *, lora: Lora | None, template: str | None = None, replace: bool = False,
    finish: Callable[[Path, Merged], None] | None = None, progress: Progress = silent,
) -> Merged:  # fmt: skip
    """Merge the weights in `trained` (a training checkpoint's trainable.safetensors) into `base`, as folder `out`.

    lora: rank and alpha; None in full fine-tuning. template: the chat template of the run. finish: writes what else
    belongs into the folder, after the audit. Raises SparkError where the two do not fit or the audit finds anything,
    OSError naming `out` where the disk is full, or what cannot be read; `out` is then what it was.
    """
    checkpoint, changes = prepare(base, trained, lora)
    merged = describe(checkpoint, changes)
    require_space(out, merged.bytes)
    with naming(out), staged_folder(out, replace=replace) as stage:
        copy_companions(base, stage, template)
        with promising(stage) as promised:
            with progress.task("merging", merged.bytes, "B") as task:
                write_weights(checkpoint, changes, stage, task)
            problems = audit(stage, promised=promised)
        if problems:
            raise SparkError(
                f"the merged checkpoint is not whole: {'; '.join(problems)}",
                f"{_amiss(base)}; nothing was written to `{out}`",
            )
        if finish:
            finish(stage, merged)
    return merged


def _amiss(base: Path) -> str:
    """Whose fault an incomplete merge is."""
    if not audit(base):
        return "the base is whole, so this is a bug"
    return (
        f"the base `{base}` is not whole either: take it as it was published (transformers saves a Qwen3.5 without its "
        "MTP head), or have its config.json promise what is there"
    )


def require_space(out: Path, size: int, elsewhere: str = ELSEWHERE) -> None:
    """Raise SparkError where the file system of `out` has not `size` bytes and a little more to spare.

    elsewhere: how the work is done on another one.
    """
    there = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size + min(SPARE, size):
        raise SparkError(
            f"`{there}` has {free / 1e6:,.1f} MB free, and the result takes {size / 1e6:,.1f} MB",
            f"{elsewhere} writes elsewhere; or free some space there",
        )


def write_weights(checkpoint: Checkpoint, changes: dict[str, Update], out: Path, task: Task) -> None:
    """The shards by the base's names, and its index where it has one."""
    for path in checkpoint.shards():
        with (out / path.name).open("wb") as target:
            _write_shard(TensorFile(path), changes, target, task)
    index = checkpoint.folder / INDEX
    if checkpoint.sharded:
        (out / INDEX).write_bytes(_index(index.read_bytes(), checkpoint))


def _write_shard(shard: TensorFile, changes: dict[str, Update], target: BinaryIO, task: Task) -> None:
    target.write(shard.header)
    task.advance(len(shard.header))
    for name in shard.names():
        if name in changes:
            _write_changed(shard, name, changes[name], target, task)
        else:
            shard.copy_bytes(name, target, task.advance)


def _write_changed(shard: TensorFile, name: str, update: Update, target: BinaryIO, task: Task) -> None:
    """The tensor's new value, a block of rows at a time."""
    import torch

    rows = shard.shape(name)[0]
    step = max(1, BLOCK // max(1, shard.elements(name) // rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        base_OI = shard.rows(name, start, stop)
        trained_OI = update.rows(base_OI.float(), start, stop)
        # of the two extremes, not of every value: a tenth of the time, and NaN shows in them too
        if not torch.isfinite(torch.stack(torch.aminmax(trained_OI)).to(base_OI.dtype)).all():
            raise SparkError(
                f"the merged `{name}` is not finite: NaN, or too large for {shard.dtype(name)}",
                another(update.file.path),
            )
        data = trained_OI.to(base_OI.dtype).reshape(-1).view(torch.uint8).numpy().data
        target.write(data)
        task.advance(data.nbytes)


def _index(data: bytes, checkpoint: Checkpoint) -> bytes:
    """The base's index, byte for byte where its total_size holds."""
    values = json.loads(data)
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    if values.get("metadata", {}).get("total_size") == total:
        return data
    values["metadata"] = {**values.get("metadata", {}), "total_size": total}
    return (json.dumps(values, indent=2) + "\n").encode()
