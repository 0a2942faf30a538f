"""What a training checkpoint does to the tensors of its base: W + s · B·A, or an fp32 master in W's place."""

# O rows of a tensor (its first axis) · I all its other axes flattened · R rank

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Lora
from sparkctl.model.weights import Checkpoint, TensorFile
from sparkctl.train import state

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
NAMED = 5  # names that a message lists


class Update(Protocol):
    """The change of one base tensor."""

    @property
    def file(self) -> TensorFile:
        """The training checkpoint's."""
        ...

    def rows(self, base_OI: Tensor, start: int, stop: int) -> Tensor:
        """The trained rows [start, stop) in fp32, given the base's in fp32, which may be overwritten."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + scale · B·A."""

    file: TensorFile
    module: str
    scale: float

    def rows(self, base_OI: Tensor, start: int, stop: int) -> Tensor:
        b_OR = self.file.rows(self.module + LORA_B, start, stop)
        return base_OI.add_(b_OR @ self.file.read(self.module + LORA_A), alpha=self.scale)


@dataclass(frozen=True)
class Master:
    """The master's rows as they are."""

    file: TensorFile
    name: str

    def rows(self, base_OI: Tensor, start: int, stop: int) -> Tensor:
        return self.file.rows(self.name, start, stop).reshape(base_OI.shape)


def updates(trained: Path, base: Checkpoint, lora: Lora | None, *, tied: bool) -> dict[str, Update]:
    """Base tensor → what the checkpoint in `trained` makes of it. lora None: full fine-tuning.

    tied: config.json shares embedding and lm_head. Raises SparkError naming what does not fit the base.
    """
    file = TensorFile(trained)
    if lora is None:
        return dict(_masters(file, base, tied))
    return dict(_adapters(file, base, lora))


def adapted_modules(file: TensorFile) -> list[str]:
    """The module paths that carry an adapter, in the file's order. Raises SparkError where one half is missing."""
    ends = {name.removesuffix(end): end for end in (LORA_A, LORA_B) for name in file.names() if name.endswith(end)}
    halves = [name for module in ends for name in (module + LORA_A, module + LORA_B) if name not in file.names()]
    strays = [name for name in file.names() if not name.endswith((LORA_A, LORA_B))]
    if halves or strays:
        raise SparkError(f"`{file.path}` is no set of adapters: {listed(halves or strays)}", another(file.path))
    return list(ends)


def _adapters(file: TensorFile, base: Checkpoint, lora: Lora) -> Iterator[tuple[str, Update]]:
    modules = adapted_modules(file)
    _fit(file.path, base, {f"{module}.weight": _product(file, module, lora) for module in modules})
    for module in modules:
        yield f"{module}.weight", LowRank(file, module, lora.alpha / lora.r)


def _product(file: TensorFile, module: str, lora: Lora) -> tuple[int, ...]:
    """Shape of B·A."""
    a, b = file.shape(module + LORA_A), file.shape(module + LORA_B)
    if len(a) != 2 or len(b) != 2 or a[0] != lora.r or b[1] != lora.r:
        raise SparkError(
            f"the adapter of `{module}` has shapes {a} and {b}, which is not rank {lora.r}", another(file.path)
        )
    return b[0], a[1]


def _masters(file: TensorFile, base: Checkpoint, tied: bool) -> Iterator[tuple[str, Update]]:
    _fit(file.path, base, {name: file.shape(name) for name in file.names()})
    for name in file.names():
        yield name, Master(file, name)
        # a tied head that the base also stores is the embedding once more, unless transformers found the two to differ
        # and trained both
        if tied and name.endswith("embed_tokens.weight") and "lm_head.weight" in base.names() - file.names():
            yield "lm_head.weight", Master(file, name)


def _fit(path: Path, base: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise SparkError unless each wanted tensor is in the base with that shape."""
    hint = f"is `{base.folder}` the model that this run was trained on?"
    absent = [name for name in wanted if name not in base.names()]
    if absent:
        raise SparkError(f"`{path}` was trained on tensors that the base does not have: {listed(absent)}", hint)
    other = [f"{n} {shape}, the base {base.shape(n)}" for n, shape in wanted.items() if base.shape(n) != shape]
    if other:
        raise SparkError(f"`{path}` was trained on tensors of other shapes: {listed(other)}", hint)


def another(trained: Path) -> str:
    """The hint where the weights in `trained` cannot be merged: their checkpoint lies two folders below its run."""
    checkpoint = trained.parent
    if name := state.another(checkpoint):
        return shlex.join(["sparkctl", "merge", str(checkpoint.parent.parent), "--checkpoint", name])
    return f"`{state.anew(checkpoint)}` begins anew: {state.ALONE}"


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + more
