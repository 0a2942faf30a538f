"""Bytes that the native engine allocates on a GPU, counted without one, as JSON: python tests/allocations.py < cases

The engine runs on tensors without storage ("meta") at a published size, every launch left out: what is counted are the
tensors that its Python makes, and those that torch's FlashAttention-2 makes, which `flash_backward` lists. Run as a
process of its own, since much is replaced for it.

A case is {"kind": "native" or "head", "work": a Workload's JSON, "multiprocessors": 0 for this project's attention,
"hopper": whether that is in the tiles for Hopper}.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sparkctl_kernels
import torch
from sparkctl_kernels import dispatch, gemm
from sparkctl_kernels.attention import flash, kernel
from sparkctl_kernels.attention.kept import FlashKept
from sparkctl_kernels.documents import Documents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparkctl.bench.workload import Workload, random_model

# T tokens · N query heads · K kv heads · H head dim
META = torch.device("meta")
BLOCK = 512  # bytes: what torch's allocator rounds up to
Tensor = torch.Tensor


class Counter(TorchDispatchMode):
    """now: bytes of the tensors that live; peak: the most since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device == META:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._live.remove(key)
        self.now -= size


def leave_out_launches() -> None:
    """Take every Triton path; a launch does nothing, a product gives a tensor, nothing is read from a GPU."""
    from triton.runtime.jit import JITFunction

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla says that there is no GPU
        from sparkctl_kernels.gated_delta import fla_rule, op
    for found in pkgutil.walk_packages(sparkctl_kernels.__path__, "sparkctl_kernels."):
        module = importlib.import_module(found.name)
        if hasattr(module, "fused"):
            module.fused = lambda _: True
        if hasattr(module, "add_to"):
            module.add_to = lambda *_: None
    JITFunction.__getitem__ = lambda *_: lambda *_, **__: None
    gemm.by_torch = lambda *_: None
    op.choice = lambda *_: dispatch.Choice("gated_delta", "fla kernels", "as on a GPU")
    for launched in fla_rule.KERNELS:
        launched.__class__ = type("Left", (fla_rule.Tuned,), {"__call__": lambda *_, **__: None})
    fla_rule.capability = lambda _: (9, 0)


def take_engine_apart() -> None:
    """The parts of the engine that look at the device or compute on the host."""
    from sparkctl_kernels.lora_linear import kernel

    from sparkctl.model import lora
    from sparkctl.mtp import drafter
    from sparkctl.train.engines.native import engine, model

    kernel.Table = lambda _: type("Table", (), {"round": lambda _: None})()
    engine.pin_start = drafter.settle = engine.settle = lambda *_: []
    lora.initial_a = lambda _, rank, width, __: torch.empty(rank, width, device=META)
    model.NativeModel.rotation = lambda _, positions: [torch.empty(len(positions), 32, device=META) for _ in range(2)]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, FlashKept]:
    """What torch's own gives, see `flash.forward`."""
    tokens, heads, _ = q.shape
    o, log_sum = torch.empty_like(q), torch.empty(heads, tokens, device=META)
    return o, FlashKept(q, k, v, o, log_sum, log_sum[:0], log_sum[:0])


def flash_backward(multiprocessors: int) -> Any:
    """What torch's own makes in its deterministic backward over documents, beside (dq, dk) which it gives."""

    def backward(
        do: Tensor, saved: FlashKept, documents: Documents, window: int | None, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = saved[:3]
        (tokens, heads, head_dim), count = q.shape, len(documents.lengths)
        dq, dk, own_dv = torch.empty_like(q), torch.empty_like(k), torch.empty(v.shape, dtype=v.dtype, device=META)
        rows, splits = tokens + 128 * count, -(-multiprocessors // (count * heads))
        others = [torch.empty(heads, rows, device=META), torch.empty(splits, rows, heads, head_dim, device=META)]
        if k.shape[1] < heads:
            others += [torch.empty_like(q), torch.empty_like(q)]
        del others, own_dv
        return dq, dk

    return backward


@contextmanager
def attention(multiprocessors: int, hopper: bool) -> Iterator[None]:
    """By FlashAttention-2 on a GPU of so many, or by this project's kernel."""
    kernel.in_wide_tiles, flash.serves = lambda *_: hopper, lambda *_: bool(multiprocessors)
    flash.forward, flash.backward = flash_forward, flash_backward(multiprocessors)
    yield


def engine_of(kind: str, work: Workload) -> Any:
    """The engine on a model without storage."""
    from sparkctl.mtp.drafter import Drafter
    from sparkctl.mtp.engine import HeadEngine
    from sparkctl.train.engines.native.engine import from_model

    base = random_model(work, META, torch.bfloat16 if work.lora or kind == "head" else torch.float32)
    if kind == "native":
        return from_model(base, lora=work.lora, checkpointing=work.checkpointing)
    return HeadEngine(Drafter.of(base.eval(), work.text), steps=work.draft_steps, decay=0.6, loss="kl")


def count(kind: str, work: Workload) -> dict[str, int]:
    """Bytes of weights with masters, of gradients, and of the work of a micro-step whose gradients wait already."""
    with Counter() as counter:
        engine = engine_of(kind, work)
        weights, pack = counter.now, work.pack()
        engine.micro_step(pack, 1.0)
        counter.peak = begun = counter.now
        engine.micro_step(pack, 1.0)
        trainable = sum(parameter.numel() for parameter in engine.parameters().values())
        return dict(weights=weights, gradients=begun - weights, work=counter.peak - begun, trainable=trainable)


def main() -> None:
    """A line of JSON for all cases."""
    leave_out_launches()
    take_engine_apart()
    answers = []
    for case in json.load(sys.stdin):
        with attention(case["multiprocessors"], case.get("hopper", False)):
            answers.append(count(case["kind"], Workload.loads(case["work"])))
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
