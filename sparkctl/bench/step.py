"""`bench step`: the same training step by several stacks, each in a process of its own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from sparkctl import child, env
from sparkctl.bench.heads import stacks_of
from sparkctl.bench.setting import Setting
from sparkctl.bench.worker import Measured
from sparkctl.bench.workload import Workload
from sparkctl.errors import SparkError, UsageError
from sparkctl.hardware import heads, measurements
from sparkctl.hardware.load import Load
from sparkctl.hardware.shape import Shape
from sparkctl.hardware.throughput import operations
from sparkctl.manifest.store import now
from sparkctl.progress import Progress, silent

CACHES = {  # variables that say where a stack keeps compiled kernels
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "FLA_CACHE_DIR": "fla",
}  # fmt: skip


COMPARED = {"stock": None, "peft-fla": "fla", "unsloth": "unsloth", "native": None}  # stack: the package it wants
CLASS = re.compile(r"^(\w+\.)*[A-Z]\w*: ")  # of an exception, in front of its message


@dataclass(frozen=True)
class Row:
    """A stack's result. cold: seconds from process start to the end of a first step with empty caches.

    kept: whether plans of the model on this machine expect its rate from now on.
    """

    stack: str
    tokens: int
    measured: Measured | None  # None where it failed
    operations: float = 0.0  # floating-point operations of a micro-step as this stack does it
    cold: float | None = None
    failed: str | None = None
    kept: bool = False

    def rate(self, percentile: int = 50) -> float | None:
        """Tokens a second at a percentile of the speed, which is its opposite of the time."""
        seconds = getattr(self.measured, f"p{100 - percentile}", None)
        return self.tokens / seconds if seconds else None

    @property
    def share(self) -> float | None:
        """Operations a second over the rate of a large bf16 product, measured in the same process."""
        m = self.measured
        return self.operations / m.p50 / m.gemm_rate if m and m.p50 and m.gemm_rate else None


def installed() -> tuple[list[str], list[str]]:
    """The stacks that are compared unless others are named: those whose package is here, and those whose is not."""
    here = [name for name, package in COMPARED.items() if package is None or find_spec(package)]
    return here, [name for name in COMPARED if name not in here]


def bench_step(
    at: Setting, stacks: Sequence[str], *, steps: int = 20, cold: bool = False, progress: Progress = silent
) -> Iterator[Row]:
    """Measure each stack; its row comes when it is there. One that fails is a row that says why.

    The native engine's rate is kept for plans of the same model at once. Raises UsageError at a name that is no stack,
    or without any.
    """
    known = stacks_of(at.work)
    unknown = [name for name in stacks if name not in known]
    if unknown or not stacks:
        what = f"no stack `{unknown[0]}`" if unknown else "no stack is named"
        command = f"sparkctl bench {'mtp' if at.work.draft_steps else 'step'} --help"
        raise UsageError(f"{what}; there are {', '.join(known)}", command)
    for name in stacks:
        progress.say(f"measuring {name}")
        try:
            row = _row(name, at, steps, cold)
        except SparkError as error:
            row = Row(name, at.work.tokens, None, failed=error.message)
        yield replace(row, kept=steps >= measurements.ENOUGH and _keep(at, row))


def _keep(at: Setting, row: Row) -> bool:
    """Keep its rate for `recommend`, where that has no training's own: of the one stack that is an engine as it trains.

    Not of full fine-tuning, whose optimiser takes a tenth and more of a step of one pack. An earlier benchmark's is
    replaced. Gives whether it was kept.
    """
    work, rate = at.work, row.rate()
    if at.model_key is None or row.stack != "native" or not rate or (work.mode == "full" and not work.draft_steps):
        return False
    rank = work.draft_steps or (work.rank if work.lora else 0)
    kind = measurements.Kind(at.model_key, work.trained, rank, work.checkpointing)
    known = measurements.lookup(at.machine, kind)
    if any(one.engine == "native" and one.pack_length == at.pack_length and not one.benched for one in known):
        return False
    return measurements.record(at.machine, kind, "native", rate, at.pack_length, now(), benched=True)


def _row(name: str, at: Setting, steps: int, cold: bool) -> Row:
    work, device = at.work, at.machine.device
    with tempfile.TemporaryDirectory() as caches:
        own = {variable: str(Path(caches) / folder) for variable, folder in CACHES.items()} if cold else {}
        first = _measure(name, work, device, 0, own).first_step if cold else None
        measured = _measure(name, work, device, steps, own)
    return Row(name, work.tokens, measured, operations_of(measured, work, at.parameters), first)


def operations_of(measured: Measured, work: Workload, parameters: int) -> float:
    """What the stack computes in a micro-step, without the quadratic part of attention and the delta rule."""
    shape = Shape.from_config(work.config, parameters)
    if work.draft_steps:
        each = heads.operations(
            shape, measured.head_rows / work.tokens, work.draft_steps, everywhere=measured.stack != "native",
            checkpointing=measured.checkpointing,
        )  # fmt: skip
        return each * work.tokens
    load = Load(
        mode=work.mode, trainable=measured.trainable, rank=work.rank, area=work.tokens, longest=max(work.lengths),
        labels=measured.head_rows, checkpointing=measured.checkpointing, device="cuda",
    )  # fmt: skip
    return operations(shape, load) * work.tokens


def _measure(name: str, work: Workload, device: str, steps: int, variables: dict[str, str]) -> Measured:
    """Run the worker. Raises SparkError with the last line of its words."""
    said, problem = child.answer(
        "sparkctl.bench.worker", name, device, str(steps), seconds=None, input=work.dumps(),
        environment={**env.everything(), **variables},
    )  # fmt: skip
    if problem:
        raise SparkError(f"stack `{name}` failed: {CLASS.sub('', problem)}")
    return Measured(**said)
