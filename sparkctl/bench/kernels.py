"""`bench kernels`: each operator checked first, then timed beside its plain torch, a library's version and the ceiling.

Right is what is at most twice as far from fp32 as plain torch in bf16, output by output, gradient by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from sparkctl.bench import clock
from sparkctl.bench.setting import Setting
from sparkctl.bench.subjects import Sizes, Subject
from sparkctl.errors import OtherOptions
from sparkctl.hardware.measurements import Probe, probe
from sparkctl.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from sparkctl.bench.subjects import Form, Tensors

WHERE = {  # operator: the module here that says what it is given; it has a function of the operator's name
    "rms_norm": "operators", "silu_mul": "operators", "qk_norm_rope": "operators", "attention": "mixers",
    "sigmoid_gate": "operators", "causal_conv": "mixers", "gated_delta": "mixers", "gated_norm": "operators",
    "lora_linear": "linears", "full_linear": "linears", "matmul": "linears", "linear_cross_entropy": "linears",
}  # fmt: skip
HYBRID = ("sigmoid_gate", "causal_conv", "gated_delta", "gated_norm")  # of models with GatedDeltaNet
ALLOWED = 2.0  # times plain torch's error
SLACK = 1e-4  # relative: plain torch may be exact by chance
UNCHECKED = "not checked: what it is held against is the library's error"
ENDLESS = 1e9  # stands for the distance of what is no number
WARMUP, PROFILED = 3, 3


@dataclass(frozen=True)
class Timing:
    """Seconds of forward and backward: percentiles of calls in a row, and GPU-busy time where there is a GPU."""

    p20: float
    p50: float
    p80: float
    busy: float | None


@dataclass(frozen=True)
class Row:
    """An operator's result. errors: of each output and gradient, over what is allowed; at most 1 is right."""

    operator: str
    kernel: str
    errors: dict[str, float]
    ours: Timing | None = None
    eager: Timing | None = None
    library: tuple[str, Timing] | None = None
    ceiling: float = 0.0  # seconds at the machine's measured rates
    memory_bound: bool = False
    failed: str | None = None
    unchecked: str | None = None  # why nobody checked it

    @property
    def right(self) -> bool | None:
        """Whether every result is near enough to fp32; what gave no number is not. None: it was not checked."""
        if self.unchecked:
            return None
        return not self.failed and all(error <= 1 for error in self.errors.values())

    @property
    def share(self) -> float | None:
        """Of the ceiling, by GPU-busy time where it is known."""
        return self.ceiling / (self.ours.busy or self.ours.p50) if self.ours else None


def bench_kernels(
    at: Setting, operators: Sequence[str] = (), *, calls: int = 20, library: bool = True, progress: Progress = silent
) -> Iterator[Row]:
    """Every operator of the shape, or those named, each when it was measured. library: its version beside ours.

    Raises UsageError at a name that is none of its operators.
    """
    import torch
    from sparkctl_kernels.ways import refusals

    sizes = Sizes.of(at.work, torch.device(at.machine.device))
    there = [name for name in WHERE if sizes.hybrid or name not in HYBRID]
    known = [name for name in operators if name in there]
    for name in operators:
        if name not in there:
            message = f"{at.name} has no operator `{name}`; it has {', '.join(there)}"
            raise OtherOptions(message, operators=",".join(known) or None)
    rates = probe(at.machine)
    for name in operators or there:
        progress.say(f"measuring {name}")
        try:
            subject = getattr(import_module(f"sparkctl.bench.{WHERE[name]}"), name)(sizes)
            if not library or sizes.device.type != "cuda":
                subject = replace(subject, library=None)
            row = measure(subject, sizes.device, rates, calls, progress)
        except refusals() as error:
            row = Row(name, "", {}, failed=str(error).splitlines()[0])
        yield row


def measure(subject: Subject, device: torch.device, rates: Probe, calls: int, progress: Progress = silent) -> Row:
    """Check it; time it where it is right."""
    import torch

    if subject.library and subject.library.first_time:
        progress.say(f"{subject.name}: {subject.library.first_time}")
    torch.manual_seed(0)
    given = subject.inputs()
    half = {n: t if n in subject.fixed else t.bfloat16() for n, t in given.items()}
    unchecked = UNCHECKED if subject.judged_by_library and not subject.library else None
    errors = {} if unchecked else compare(subject, half)
    by_memory, by_arithmetic = subject.bytes / rates.bytes, subject.operations / rates.operations
    row = Row(
        subject.name, subject.kernel, errors, ceiling=max(by_memory, by_arithmetic),
        memory_bound=by_memory > by_arithmetic, unchecked=unchecked,
    )  # fmt: skip
    if row.right is False:
        return row

    def timed(form: Form) -> Timing:
        return time(form(copied(half)), device, calls)

    library = (subject.library.name, timed(subject.library.form)) if subject.library else None
    return replace(row, ours=timed(subject.ours), eager=timed(subject.eager), library=library)


def compare(subject: Subject, half: Tensors) -> dict[str, float]:
    """The distance of each result from fp32, over what is allowed; the inputs are the same, rounded, for all."""
    truth = subject.eager({n: t.float().clone() for n, t in half.items()})()
    judge = subject.library.form if subject.library and subject.judged_by_library else subject.eager
    theirs, ours = judge(copied(half))(), subject.ours(copied(half))()
    assert set(ours) == set(theirs) == set(truth), (subject.name, sorted(ours), sorted(theirs), sorted(truth))
    return {
        name: distance(ours[name], value) / (ALLOWED * distance(theirs[name], value) + SLACK)
        for name, value in truth.items()
    }


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative to the truth's norm."""
    error = float((found.float() - truth).norm() / truth.norm())
    return error if error < ENDLESS else ENDLESS


def copied(tensors: Tensors) -> Tensors:
    """What a run may overwrite."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def time(run: Callable[[], object], device: torch.device, calls: int) -> Timing:
    """Forward and backward in a row, then profiled."""
    for _ in range(WARMUP):
        run()
    times = clock.in_a_row(run, device, calls)
    busy = clock.busy(run, device, PROFILED)
    return Timing(
        times.percentile(20), times.percentile(50), times.percentile(80), busy.milliseconds / 1e3 if busy else None
    )
