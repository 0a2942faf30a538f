"""One stack measured in a process of its own: `python -m sparkctl.bench.worker STACK DEVICE STEPS < workload.json`.

Prints one JSON object on its last line. With STEPS 0 it ends after the first step: how long a start takes.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field

from sparkctl.bench import clock
from sparkctl.bench.workload import Workload
from sparkctl.errors import SparkError

WARMUP = 3
PROFILED = 3
SHOWN_KERNELS = 40


@dataclass
class Measured:
    """Seconds, bytes and counts of one stack. Times are a micro-step's; None where they were not taken."""

    stack: str
    first_step: float  # from process start to the end of the first step
    trainable: int
    head_rows: int
    checkpointing: bool
    choices: dict[str, str]
    loss: float  # of the first step, mean over the label tokens
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    busy: float | None = None  # GPU-busy seconds
    launches: float | None = None
    peak_memory: int | None = None
    gemm_rate: float | None = None  # FLOP/s of a large bf16 product, measured beside it
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(name: str, work: Workload, device_type: str, steps: int) -> Measured:
    """Build the stack, warm it up, time it, then profile it. Raises SparkError where its loss is no number."""
    import torch

    from sparkctl.bench.heads import stacks_of

    device = torch.device(device_type)
    stack = stacks_of(work)[name](work, device)
    loss = float(stack.step()) / stack.summed
    clock.wait(device)
    if not math.isfinite(loss):
        raise SparkError(f"the loss of its first step is {loss}", "take another model, or other weights of it")
    result = Measured(
        name, clock.process_age(), stack.trainable, stack.head_rows, stack.checkpointing, stack.choices, loss
    )
    if not steps:
        return result
    for _ in range(WARMUP):
        stack.step()
    clock.wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = clock.in_a_row(stack.step, device, steps)
    result.p20, result.p50, result.p80 = (times.percentile(p) for p in clock.PERCENTILES)
    if device.type == "cuda":
        result.peak_memory = torch.cuda.max_memory_allocated(device)
        profiled = clock.busy(stack.step, device, PROFILED)
        assert profiled
        result.busy, result.launches = profiled.milliseconds / 1e3, profiled.launches
        longest = sorted(profiled.kernels.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS]
        result.kernels = {name[:120]: numbers for name, numbers in longest}
    result.gemm_rate = gemm_rate(device)
    return result


def gemm_rate(device: object) -> float:
    """FLOP/s of a large bf16 product: on a GPU the median of 20 of 8192³ that run one after another."""
    import torch

    size, count = (8192, 20) if getattr(device, "type", "") == "cuda" else (768, 5)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))  # type: ignore[call-overload]
    for _ in range(3):
        a @ b
    return 2 * size**3 / clock.in_a_row(lambda: a @ b, device, count).percentile(50)


def main() -> None:
    """The command of this module."""
    name, device, steps = sys.argv[1:4]
    result = measure(name, Workload.loads(sys.stdin.read()), device, int(steps))
    sys.stdout.write("\n" + json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()
