"""The fast path exercised, each part in a process of its own: `python -m sparkctl.doctor.exercise speed|proof`.

Prints a JSON object a line, each when it is there: torch itself, then its rates; the operators, then their proof. What
a library prints on the way goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sparkctl.doctor import importing

if TYPE_CHECKING:
    import torch

    from sparkctl.data.batches import Pack
    from sparkctl.hardware.nvml import Gpu
    from sparkctl.train.engines.base import Engine

SHAPE = "qwen3.5-2b"  # whose operators are asked for, and whose head sizes the small model has
PACKS = 8  # that gradients are compared on: with fewer, the worst of a small model's ratios passes 2 by chance
REPEATS = 30
LENGTHS = (70, 75, 67)
SECONDS = 1.5  # of products, and of copies: long enough for a power cap to show
TICK = 0.2  # seconds between looks at the clocks
SIZES = {"cuda": (8192, 1 << 28), "cpu": (768, 1 << 26)}  # of a product's matrices; bytes of a copy


def kernels(device: torch.device) -> dict[str, Any]:
    """Each operator of a Qwen3.5 and the kernel that it runs on here."""
    from sparkctl.model import catalog
    from sparkctl.train.engines.native import engine

    text = catalog.config(SHAPE)["text_config"]
    parts = engine.kernels(SimpleNamespace(config=SimpleNamespace(**text)), device)
    return {"operators": [asdict(part) for part in parts]}


def proof(device: torch.device) -> dict[str, Any]:
    """The native engine on a small model with a Qwen3.5's head sizes: gradients beside the reference's, and again.

    Not on the demo's model: its key dim of 32 takes other tiles than real ones, on Hopper those that are wrong.
    """
    from sparkctl.hardware.machine import this_machine
    from sparkctl.model import catalog
    from sparkctl.progress import silent
    from sparkctl.train.engines.native import engine as native
    from sparkctl.verify import lossless
    from sparkctl.verify.gradients import Truth, ratio
    from sparkctl.verify.small import plan_for, write_model

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparkctl-doctor-") as folder, lossless.exactly():
        small = write_model(Path(folder, "model"), catalog.config(SHAPE), "whole model")
        plan = plan_for("native", "lora", this_machine().model_copy(update={"device": device.type}))
        setting = lossless.Setting(plan, small, [pack(number) for number in range(PACKS)], [])
        truth = Truth(Path(folder))
        measure = partial(lossless.measure, setting, truth=truth, progress=silent, gradients_alone=True)
        measure(partial(lossless.load_judge, setting, _dtype("float32")), what="the truth", making=True)
        theirs = measure(partial(lossless.load_judge, setting, _dtype("bfloat16")), what="the reference")
        ours = measure(partial(native.load, plan, small, {}, allow_slow=True), what="the native engine")
        differing = repeated(native.load(plan, small, {}, allow_slow=True))
    ratios = {name: ratio(ours.distances[name].relative, one.relative) for name, one in theirs.distances.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "ratio": ratios[worst], "tensor": worst, "median": median(ratios.values()), "repeats": REPEATS,
        "differing": differing, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def pack(number: int) -> Pack:
    """Three documents of random tokens, all labels but the first."""
    import numpy as np

    from sparkctl.data.batches import Document, Pack
    from sparkctl.data.tokens import label_count
    from sparkctl.verify.small import SIZES

    random = np.random.RandomState(number)
    ids = [random.randint(0, SIZES["vocab_size"], length).astype(np.int32) for length in LENGTHS]
    documents = [Document(i, row, np.arange(len(row)) > 0) for i, row in enumerate(ids)]
    return Pack(documents, sum(LENGTHS), sum(label_count(d.trained) for d in documents))


def repeated(engine: Engine) -> list[int]:
    """Which repeats of a forward and backward differ from the first in any bit of the loss or a gradient."""
    import torch

    from sparkctl.verify.gradients import fill_adapters

    fill_adapters(engine.parameters(), 0)
    work, first, differing = pack(0), None, []
    for number in range(1 + REPEATS):
        for parameter in engine.parameters().values():
            parameter.grad = None
        loss = engine.micro_step(work, 1 / work.labels)
        found = [loss, *(p.grad for p in engine.parameters().values() if p.grad is not None)]
        if first is None:
            first = [tensor.clone() for tensor in found]
        elif len(found) != len(first) or not all(map(torch.equal, first, found)):
            differing.append(number)
    return differing


def speed(device: torch.device) -> dict[str, Any]:
    """Rates of large bf16 products and of copies, in the median of SECONDS: operations and bytes a second."""
    import torch

    from sparkctl.hardware import nvml

    before = nvml.here().gpu if device.type == "cuda" else None
    size, nbytes = SIZES[device.type]
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.empty(nbytes, dtype=torch.uint8, device=device)
    c = torch.empty_like(b)
    with watched() as seen:
        product = _seconds(lambda: torch.mm(a, a), device)
    copy = _seconds(lambda: c.copy_(b), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    rates = {"operations": 2 * size**3 / product, "bytes": 2 * nbytes / copy}
    return {"gpu": name, **rates, "busy": before.busy if before else None, **under_load(seen)}


@contextlib.contextmanager
def watched() -> Iterator[list[Gpu]]:
    """What NVML says of the GPU every TICK seconds while the block runs."""
    from sparkctl.hardware import nvml

    seen: list[Gpu] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(TICK):
            gpu = nvml.here().gpu
            seen.extend([gpu] if gpu else [])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join(1.0)


def under_load(seen: list[Gpu]) -> dict[str, Any]:
    """The median of clock (MHz) and power (W), and every reason why the clock was held down."""
    clocks = [gpu.clock for gpu in seen if gpu.clock is not None]
    powers = [gpu.power for gpu in seen if gpu.power is not None]
    return {
        "clock": median(clocks) if clocks else None, "most_clock": seen[-1].most_clock if seen else None,
        "power": median(powers) if powers else None, "throttled": sorted({r for g in seen for r in g.throttled}),
    }  # fmt: skip


def _seconds(work: Any, device: torch.device) -> float:
    from sparkctl.bench import clock

    clock.in_a_row(work, device, 3)
    first = clock.in_a_row(work, device, 3).percentile(50)
    return clock.in_a_row(work, device, max(3, int(SECONDS / first))).percentile(50)


def torch_and_rates() -> Iterator[dict[str, Any]]:
    """torch as it is here, then `speed`: it is imported once for both."""
    import torch

    yield {"torch": importing.torch_facts(torch)}
    yield {"speed": speed(_device())}


def kernels_and_proof() -> Iterator[dict[str, Any]]:
    """`kernels`, then `proof`: most of both is the same imports."""
    device = _device()
    yield kernels(device)
    yield {"proof": proof(device)}


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


PARTS = {"speed": torch_and_rates, "proof": kernels_and_proof}


def main(part: str) -> None:
    """Print what that part finds."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for found in PARTS[part]():
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
