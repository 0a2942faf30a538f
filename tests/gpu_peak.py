"""What one training takes of a device at its worst, as JSON: a case on stdin, the answer on the last line of stdout.

Run as a process of its own by tests/real/memory_gpu.py. It says "ready" once the slow imports are done, and waits: the
device is still untouched then, and its memory in use is what others hold.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers  # noqa: F401  # its import takes seconds

from sparkctl import env
from sparkctl.bench.heads import DECAY
from sparkctl.bench.workload import Workload, random_model
from sparkctl.hardware.machine import available_memory
from sparkctl.train import guard
from sparkctl.train.optim import Optimizer

SHORTER = 0.93  # of a pack's documents: packs of one run differ, and so do the blocks that they want


def native(work: Workload, device: torch.device) -> Any:
    """The native engine."""
    from sparkctl.train.engines.native.engine import from_model

    dtype = torch.bfloat16 if work.lora else torch.float32
    return from_model(random_model(work, device, dtype), lora=work.lora, checkpointing=work.checkpointing)


def reference(work: Workload, device: torch.device) -> Any:
    """The reference engine, which pads what it is given up to the pack's area."""
    import peak_memory

    from sparkctl.model.plain import plain_layers
    from sparkctl.train.engines.hopper import allow_on_hopper

    model = random_model(work, device, torch.bfloat16 if work.lora else torch.float32)
    if device.type == "cpu":
        plain_layers(model)
    else:
        allow_on_hopper(model.config)
    model.requires_grad_(not work.lora)
    plan: Any = SimpleNamespace(pack_length=work.tokens, checkpointing=work.checkpointing)
    return peak_memory.reference(model, work.mode, plan, work.rank)


def head(work: Workload, device: torch.device) -> Any:
    """The engine of an MTP head."""
    from sparkctl.mtp.drafter import Drafter
    from sparkctl.mtp.engine import HeadEngine

    drafter = Drafter.of(random_model(work, device, torch.bfloat16).eval(), work.text)
    drafter.head.begin_anew(work.seed)
    return HeadEngine(drafter, steps=work.draft_steps, decay=DECAY, loss="kl")


ENGINES: dict[str, Callable[[Workload, torch.device], Any]] = {"native": native, "reference": reference, "head": head}
PLAN: Any = SimpleNamespace(
    weight_decay=0.0, learning_rate=1e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, max_grad_norm=1.0
)


class Meter:
    """torch's peaks by phase, {name: (allocated, reserved)} in bytes; on a CPU there is nothing to read."""

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self.phases: dict[str, tuple[int, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens in the block."""
        if self.on:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on:
            torch.cuda.synchronize()
            self.phases[name] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def held(self) -> int:
        """Bytes of tensors now."""
        return torch.cuda.memory_allocated() if self.on else 0


def measure(kind: str, work: Workload, device: torch.device) -> dict[str, Any]:
    """A training's start and its first steps: what the rehearsal and the loop do, in their order."""
    before = in_use() if device.type == "cuda" else 0
    meter, pack = Meter(device), work.pack()
    with meter.phase("build"):
        engine = ENGINES[kind](work, device)
        weights = meter.held()
        optimizer = Optimizer(engine.parameters(), PLAN)
        moments = meter.held() - weights
    guard.release()  # as Session.of does
    with meter.phase("first"):
        engine.micro_step(pack, 0.5 / pack.labels).item()
    gradients = meter.held() - weights - moments
    shorter = replace(
        work, lengths=tuple(int(SHORTER * n) for n in work.lengths), labels=tuple(int(SHORTER * n) for n in work.labels)
    ).pack()
    with meter.phase("second"):
        engine.micro_step(pack, 0.5 / pack.labels).item()
    with meter.phase("update"):
        optimizer.clip()
        optimizer.step(1e-4)
    with meter.phase("next step"):
        for packed in (shorter, pack):
            engine.micro_step(packed, 0.5 / packed.labels).item()
    with meter.phase("next update"):
        optimizer.clip()
        optimizer.step(1e-4)
    with meter.phase("held out"):
        engine.eval_sum(pack).item()
    trainable = sum(parameter.numel() for parameter in engine.parameters().values())
    answer: dict[str, Any] = dict(trainable=trainable, torch=torch.__version__, host=peak_resident())
    if device.type == "cuda":
        training = [numbers for name, numbers in meter.phases.items() if name != "build"]
        context = in_use() - before - torch.cuda.memory_reserved()
        answer |= dict(
            device=torch.cuda.get_device_name(), capability="{}.{}".format(*torch.cuda.get_device_capability()),
            weights=weights, optimizer=moments, gradients=gradients,
            allocated=max(a for a, _ in training), reserved=max(r for _, r in training), context=context,
            phases=meter.phases,
        )  # fmt: skip
    return answer


def in_use() -> int:
    """Bytes of the device's memory that somebody holds; of the host's where the device has none of its own. Only
    differences mean something.
    """

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    nvml, handle, memory = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p(), Memory()
    visible = env.visible_gpu() or "0"
    nvml.nvmlInit_v2()
    if visible.isdigit():
        nvml.nvmlDeviceGetHandleByIndex_v2(int(visible), ctypes.byref(handle))
    else:
        nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(handle))
    failed = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    nvml.nvmlShutdown()
    return -available_memory() if failed or not memory.total else memory.used


def peak_resident() -> int:
    """Bytes of the host that this process held at most."""
    from peak_memory import peak_resident as resident

    return resident()


def main() -> None:
    """Read the case, print what it took."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        return  # another case ended it all
    case = json.loads(line)
    answer = measure(case["kind"], Workload.loads(case["work"]), torch.device(case["device"]))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
