"""Every kernel compiled for a GPU that need not be there: shared memory, registers, spills, warps, instructions.

    python -m sparkctl_kernels.compiled sm_121a [--json]

The launchers themselves are called, with tensors that hold nothing, so that what is compiled is what a training would
launch. Triton's own compiler does the rest: it carries a ptxas that knows sm_121a. Run it as a process of its own: it
puts a driver without a device in Triton's place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparkctl_kernels.documents import CHUNK, documents
from sparkctl_kernels.instructions import counted, on_tensor_cores
from sparkctl_kernels.limits import DOT_WARPS, SHARED
from sparkctl_kernels.shapes import DENSE, QWEN35, VOCABULARY, Shape

TOKENS = 1283  # odd: row counts are never a multiple of anything
RANK = 128
RANKS = (RANK, 24, 48)  # of all adapters on one input: also r = 8 and r = 16 on three projections
OUTSIDE = 8  # bytes of stack that may be what a kernel keeps across its loop: attention.forward at H = 256 does
NOWHERE = torch.device("meta")
LAYOUTS = (  # heads of no shape above that attention serves too: a kv head each, and one kv head for all
    Shape("32/32 heads of 64", 2048, 8192, 32, 32, 64, 64, False, False),
    Shape("8/1 heads of 256", 2048, 8192, 8, 1, 256, 256, False, False),
)


@dataclass(frozen=True)
class Report:
    """One kernel in one configuration. shared: bytes a block; dot: it has tl.dot.

    stack: bytes a thread keeps in memory for want of registers; in_loops: instructions in loops that go there, None
    where Triton's disassembler does not know the target. instructions: those that matter, and how many.
    """

    kernel: str
    shape: str
    constants: str
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    in_loops: int | None
    dot: bool
    instructions: dict[str, int]

    def faults(self, target: str) -> list[str]:
        """What keeps it from running well on the target."""
        found = []
        if self.shared > SHARED[target]:
            found.append(f"{self.shared:,} bytes of shared memory, {SHARED[target]:,} are there")
        if self.in_loops or (self.in_loops is None and self.stack > OUTSIDE):
            found.append(f"{self.stack:,} bytes spilled in its loop")
        if self.dot and self.warps > DOT_WARPS.get(target, 8):
            found.append(f"tl.dot on {self.warps} warps, {DOT_WARPS[target]} at most")
        if self.dot and not on_tensor_cores(self.instructions):
            found.append("tl.dot without tensor cores")
        return [f"{self.kernel} of {self.shape} ({self.constants}): {fault}" for fault in found]


class Nowhere:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[tuple[Any, Any]]]:
    """Launches in this block compile for `target` and do not run; gives (function, compiled kernel) of each."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[Any, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self, kernel))
        return kernel

    driver.set_active(Nowhere(int(re.sub(r"\D", "", target))))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def check(target: str, calls: dict[str, list[Callable[[], Any]]] | None = None) -> list[Report]:
    """Reports of all kernels at all configurations; `calls`: others than ours, by the name of their shape."""
    reports: dict[tuple[str, str], Report] = {}
    for shape, launches in (calls or all_calls()).items():
        with compiling(target) as compiled:
            for launch in launches:
                launch()
        for function, kernel in compiled:
            name = f"{_operator(function.__module__)}.{function.__name__.strip('_')}"
            key = name, kernel.hash
            if key not in reports:
                reports[key] = _report(name, shape, function, kernel)
    return list(reports.values())


def _operator(module: str) -> str:
    """The operator of ours, or the library that a kernel is from."""
    return "fla" if module.startswith("fla.") else module.removesuffix(".kernel").rpartition(".")[2]


def _report(name: str, shape: str, function: Any, kernel: Any) -> Report:
    constants = {function.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    registers, stack, in_loops = resources(kernel.asm["cubin"])
    return Report(
        kernel=name, shape=shape, constants=" ".join(f"{k}={v}" for k, v in constants.items() if v is not None),
        warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages, shared=kernel.metadata.shared,
        registers=registers, stack=stack, in_loops=in_loops, dot="tt.dot" in kernel.asm["ttir"],
        instructions=counted(kernel.asm["ptx"]),
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int, int | None]:
    """(registers a thread, bytes of stack a thread, spills in loops) of one kernel, by Triton's own tools."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
        used = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
        assert used, said.stdout
        registers, stack = int(used.group(1)), int(used.group(2))
        if not stack:
            return registers, 0, 0
        shown = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True)
        return registers, stack, None if shown.returncode else spills_in_loops(shown.stdout)


def spills_in_loops(sass: str) -> int:
    """Loads from and stores to the stack between a label and a branch back to it."""
    lines, labels, found = sass.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = number
        elif (branch := re.search(r"\bBRA\b.*?(\.L\w+)", line)) and branch.group(1) in labels:
            inside = range(labels[branch.group(1)], number)
            found |= {at for at in inside if re.search(r"\b(LDL|STL)\b", lines[at])}
    return len(found)


def all_calls() -> dict[str, list[Callable[[], Any]]]:
    """The launches of a training step for every shape, LoRA and full."""
    calls = {shape.name: list(_calls(shape)) for shape in (*QWEN35, *DENSE)}
    return calls | {shape.name: list(_attention(shape, torch.bfloat16, False)) for shape in LAYOUTS}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=NOWHERE)


def _calls(shape: Shape) -> Iterator[Callable[[], Any]]:
    """Trained whole (fp32 residual and weights, gradients of weights) and with adapters (bf16, widened buffers)."""
    for full in (False, True):
        weight = torch.float32 if full else torch.bfloat16
        yield from _norms(shape, weight, full)
        yield from _attention(shape, weight, full)
        if shape.key_heads:
            yield from _delta(shape, weight, full)
    if shape.key_heads:
        yield from _rule(shape)
    yield from _feed_forward(shape)
    yield from _copies()
    yield from _products(shape)


def _norms(shape: Shape, dtype: torch.dtype, full: bool) -> Iterator[Callable[[], Any]]:
    from sparkctl_kernels.rms_norm import kernel

    x, s, w = _empty(TOKENS, shape.hidden), _empty(TOKENS, shape.hidden, dtype=dtype), _empty(shape.hidden, dtype=dtype)
    y = _empty(TOKENS, shape.hidden + RANK)[:, : shape.hidden]
    offset = 1.0 if shape.gated else 0.0
    yield partial(kernel.forward, s, None, w, 1e-6, offset, y, s)
    yield partial(kernel.forward, x, s, w, 1e-6, offset, y, s)
    low = x if full else None
    for add in (True, False):
        yield partial(
            kernel.backward, y, s, w, 1e-6, offset, s, add=add, low_TD=low, remake=True, want_weight=full
        )  # fmt: skip


def _feed_forward(shape: Shape) -> Iterator[Callable[[], Any]]:
    from sparkctl_kernels.distillation import kernel as divergence
    from sparkctl_kernels.linear_cross_entropy import kernel as loss
    from sparkctl_kernels.silu_mul import kernel

    y, gate_up = _empty(TOKENS, shape.ffn + RANK)[:, : shape.ffn], _empty(TOKENS, 2 * shape.ffn)
    yield partial(kernel.forward, gate_up, y)
    yield partial(kernel.backward_, y, gate_up)
    logits, labels, losses = _empty(7, VOCABULARY), _empty(7, dtype=torch.int64), _empty(7, dtype=torch.float32)
    for gradient in (True, False):
        yield partial(loss.cross_entropy_, logits, labels, losses, 0.5, gradient)
        yield partial(divergence.divergence_, logits, logits, losses, losses, losses, 0.5, gradient)
    yield partial(divergence.log_sums, logits)


def _copies() -> Iterator[Callable[[], Any]]:
    from sparkctl_kernels.lora_linear import kernel

    table, blocks = _empty(3, 5, dtype=torch.int64), _empty(9, 2, dtype=torch.int32)
    factors = _empty(3, dtype=torch.float32)
    for aligned in (kernel.ALIGNED, 1):
        yield partial(kernel._round[(9,)], table, factors, blocks, _empty(8), kernel.BLOCK, aligned)


def _products(shape: Shape) -> Iterator[Callable[[], Any]]:
    """A layer's products, of wide layers and of adapters, with tokens whole tiles or not, and those of a toy."""
    for tokens in (TOKENS, 5376):
        for rank in RANKS:
            yield from _product(tokens, shape.hidden + rank, _empty(tokens, 2 * shape.ffn))
            yield from _product(tokens, shape.hidden, _empty(tokens, shape.hidden + rank)[:, shape.hidden :])
    yield from _product(TOKENS, 33, _empty(TOKENS, 1001))


def _product(tokens: int, width: int, y: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """y [T, N] from x of this width, and every gradient, begun anew and added to."""
    from sparkctl_kernels.matmul import kernel

    x, w = _empty(tokens, width), _empty(y.shape[1], width)
    yield partial(kernel.matmul, x, w.T, y)
    yield partial(kernel.matmul, y, w, x)
    yield partial(kernel.matmul, y, w, x, 1.0, True)
    for add in (True, False):
        yield partial(kernel.matmul, y.T, x, _empty(*w.shape, dtype=torch.float32), 1.0, add)


def _attention(shape: Shape, dtype: torch.dtype, full: bool) -> Iterator[Callable[[], Any]]:
    from sparkctl_kernels.attention import kernel as attention
    from sparkctl_kernels.attention.kept import TritonKept
    from sparkctl_kernels.qk_norm_rope import kernel as rope
    from sparkctl_kernels.sigmoid_gate import kernel as gate

    packed = documents([TOKENS - 100, 100], NOWHERE)
    widths = [shape.heads * shape.head_dim * (2 if shape.gated else 1), *[shape.kv_heads * shape.head_dim] * 2]
    projected = _empty(TOKENS, sum(widths))
    q, k, v = (part.unflatten(1, (-1, shape.head_dim)) for part in projected.split(widths, dim=1))
    gates = q[:, 1::2]
    q = q[:, ::2] if shape.gated else q
    w = _empty(shape.head_dim, dtype=dtype) if shape.normed else None
    angle = _empty(TOKENS, shape.rotated // 2, dtype=torch.float32)
    eps, offset = 1e-6, 1.0 if shape.gated else 0.0
    heads, kv_heads, whole = _empty(*q.shape), _empty(*k.shape), full and shape.normed
    yield partial(rope.forward, q, k, w, w, angle, angle, eps, offset)
    yield partial(rope.backward, heads, kv_heads, q, k, w, w, angle, angle, eps, offset, q, k, whole)
    wide = _empty(TOKENS, heads[0].numel() + RANK)[:, : heads[0].numel()]
    do = heads
    if shape.gated:
        yield partial(gate.forward, heads, gates, wide)
        yield partial(gate.backward_, wide, heads, gates, heads, gates)
    else:
        do = wide.unflatten(1, q.shape[1:])
    saved = TritonKept(heads, kv_heads, v, heads, _empty(shape.heads, TOKENS, dtype=torch.float32))
    for window in (None, 100):
        yield partial(attention.forward, heads, kv_heads, v, packed, window)
        yield partial(attention.backward, do, saved, packed, window, v)
    if shape.gated:
        pairs = _empty(2, *k.shape)
        yield partial(attention.own, heads, pairs, pairs, heads, saved.log_sum_NT, 1.0)
        yield partial(attention.own_backward_, heads, do, heads, pairs, pairs, heads, saved.log_sum_NT, 1.0)


def _delta(shape: Shape, dtype: torch.dtype, full: bool) -> Iterator[Callable[[], Any]]:
    from sparkctl_kernels.causal_conv import kernel as conv
    from sparkctl_kernels.gated_delta import kernel as gates
    from sparkctl_kernels.gated_norm import kernel as norm

    packed, dim, n = documents([TOKENS - 100, 100], NOWHERE), shape.delta_dim, shape.value_heads
    channels = (2 * shape.key_heads + n) * dim
    projected = _empty(TOKENS, channels + n * dim + 2 * n)
    x, z, b, a = projected.split([channels, n * dim, n, n], dim=1)
    z = z.unflatten(1, (n, dim))
    weight, rates = _empty(channels, 4, dtype=dtype), _empty(n, dtype=torch.float32)
    yield partial(conv.forward, x, weight, packed.positions, shape.key_heads, dim)
    dq, dv = _empty(TOKENS, n, dim), _empty(TOKENS, n * dim)
    yield partial(conv.backward, dq, dq, dv, dq, x, weight, packed.positions, shape.key_heads, x, full)
    g = _empty(TOKENS, n, dtype=torch.float32)
    yield partial(gates.forward, a, b, rates, rates, packed)
    yield partial(gates.backward, g, g, g, a, b, rates, rates, packed, a, b, full)
    o, y, w = _empty(TOKENS, n, dim), _empty(TOKENS, n * dim + RANK)[:, : n * dim], _empty(dim, dtype=dtype)
    yield partial(norm.forward, o, z, w, 1e-6, y)
    yield partial(norm.backward_, y, o, z, w, 1e-6, o, z, full)


def _rule(shape: Shape) -> Iterator[Callable[[], Any]]:
    """The library's kernels as we launch them, where it is installed."""
    from sparkctl_kernels.gated_delta import op

    if not op.launched():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from sparkctl_kernels.gated_delta import fla_rule

    packed, dim, n = documents([TOKENS - 100, 100], NOWHERE), shape.delta_dim, shape.value_heads
    q, v, g = _empty(TOKENS, shape.key_heads, dim), _empty(TOKENS, n, dim), _empty(TOKENS, n, dtype=torch.float32)
    kept = fla_rule.Kept(_empty(TOKENS, n, CHUNK), _empty(len(packed.chunks), n, dim, dim), v)
    yield partial(fla_rule.forward, q, q, v, g, g, packed)
    yield partial(fla_rule.backward, v, q, q, v, g, g, kept, packed)


def main(arguments: list[str]) -> int:
    """Print the reports, one a line or as JSON; 1 where a kernel does not fit."""
    target, *options = arguments
    reports = check(target)
    faults = [fault for report in reports for fault in report.faults(target)]
    if "--json" in options:
        print(json.dumps({"target": target, "kernels": [asdict(report) for report in reports], "faults": faults}))
    else:
        for report in sorted(reports, key=lambda r: -r.shared):
            print(
                f"{report.kernel:32} {report.shape:13} {report.warps} warps {report.stages} stages "
                f"{report.shared:7} B shared {report.registers:4} registers {report.stack:5} B stack  "
                f"{report.constants}"
            )
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
