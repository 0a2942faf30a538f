"""The ways to compute a matrix product on a GPU, measured and pinned: what `gemm` takes instead of torch's.

A way is right when it is at most twice as far from fp32 as torch's, or nearer than one unbroken fp32 sum on a tensor
core comes: where few tiles share a long sum, cuBLAS splits it among multiprocessors, and is then nearer than any way
that adds in one order. 512 x 128 sums of 5,376 random products, emulated with accumulations cut off as tensor cores do:
7.0e-6 off in one sum, 1.5e-6 in four parts, 3.4e-7 in sixteen; a gradient that passes through bf16, as eager's do for
adapters, 1.7e-3.

A training keeps the ways that it was begun with, so that it can be repeated to the bit: a run's choices hold the names
of the products and of their ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparkctl_kernels import gemm
from sparkctl_kernels.gemm import Product, Way, by_torch
from sparkctl_kernels.matmul import op as matmul

# M rows · N columns · K summed over

TORCH = "torch"
SLACK = 1e-6  # relative: fp32 sums in another order
STEP = 16  # products that a tensor core adds to an fp32 sum at once
CUT = 2**-24  # of that sum, lost each time: half a unit of the last place, in the mean
FASTER = 0.97  # of torch's time: what is nearer is noise
ENDLESS = 1e9
WARMUP, TIMED = 3, 15


@dataclass(frozen=True)
class Timed:
    """Seconds of each way; `wrong`: those that are no option, by how many times torch's own error, or the floor's,
    they are off, or ENDLESS where they were refused. errors: of all that computed, relative to fp32."""

    seconds: dict[str, float]
    wrong: dict[str, float]
    errors: dict[str, float]

    @property
    def best(self) -> str:
        """torch, unless another is clearly faster."""
        way = min(self.seconds, key=lambda name: self.seconds[name])
        return way if self.seconds[way] < FASTER * self.seconds[TORCH] else TORCH


def by_cublaslt(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """cuBLASLt, whose heuristics are not cuBLAS's."""
    usual = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        by_torch(a, b, c, scale, add)
    finally:
        torch.backends.cuda.preferred_blas_library(usual)


def by_halves(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """The columns in two products, the rows of an fp32 total: other tiles, another count of them in the last wave."""
    by_rows = c.dtype != a.dtype  # torch wants such a c in one piece
    middle = -(-c.shape[0 if by_rows else 1] // 256) * 128
    for part in (slice(None, middle), slice(middle, None)):
        some = c[part] if by_rows else c[:, part]
        if some.numel():
            by_torch(a[part] if by_rows else a, b if by_rows else b[:, part], some, scale, add)


def by_matmul(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """This project's kernel."""
    matmul.forward(a, b, c, scale, add=add)


WAYS: dict[str, Way] = {TORCH: by_torch, "cublaslt": by_cublaslt, "halves": by_halves, "matmul": by_matmul}


def pin(choices: dict[str, str]) -> None:
    """Take these ways and no others; what is not about a product here is passed over."""
    gemm.pinned.clear()
    for name, way in among(choices).items():
        gemm.pinned[Product.parse(name)] = WAYS[way]


def among(choices: dict[str, str]) -> dict[str, str]:
    """Of a run's choices, or of what was measured, the products that are not torch's: what `pin` takes."""
    return {
        name: way
        for name, way in choices.items()
        if name.startswith(f"{gemm.PREFIX} ") and way in WAYS and way != TORCH
    }


def pinned() -> dict[str, str]:
    """The products that are not torch's: "gemm nt 6144x8192x2432" → "halves"."""
    names = {way: name for name, way in WAYS.items()}
    return {str(key): names[way] for key, way in gemm.pinned.items()}


@contextmanager
def measuring(
    clock: Callable[[Callable[[], None]], float] | None = None, heard: Callable[[Product, Timed], None] | None = None
) -> Iterator[dict[Product, Timed]]:
    """Every product in this block is measured when its shape is first met; gives what was found.

    Its result is torch's meanwhile, whatever is pinned. clock: gives the seconds of a call. heard: told of each
    product once it is measured.
    """
    found: dict[Product, Timed] = {}

    def watch(
        key: Product, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, scale: float, add: bool
    ) -> None:  # fmt: skip
        if key not in found:
            out = a.new_empty(a.shape[0], b.shape[1]) if c is None else c
            found[key] = time_ways(a, b, out, scale, add, clock or seconds_of)
            if heard:
                heard(key, found[key])

    gemm.watch = watch
    try:
        yield found
    finally:
        gemm.watch = None


def time_ways(
    a_MK: torch.Tensor, b_KN: torch.Tensor, c_MN: torch.Tensor, scale: float, add: bool,
    clock: Callable[[Callable[[], None]], float],
) -> Timed:  # fmt: skip
    """Each way on this product; one that is wrong is left out. c stays as it is. Torch's own refusal is raised."""
    begun = c_MN.new_empty_strided(c_MN.shape, c_MN.stride())
    begun.copy_(c_MN if add else torch.zeros_like(c_MN))
    truth = torch.addmm(begun.float(), a_MK.float(), b_KN.float(), alpha=scale)
    scratch, errors, seconds = torch.empty_like(begun), dict[str, float](), dict[str, float]()
    floor = rounding(a_MK.shape[1])
    for name, way in WAYS.items():
        scratch.copy_(begun)
        try:
            way(a_MK, b_KN, scratch, scale, add)
        except refusals():  # layouts that a library does not take, tiles that a GPU has no room for
            if name == TORCH:
                raise
            errors[name] = ENDLESS
            continue
        errors[name] = float((scratch.float() - truth).norm() / truth.norm().clamp_min(1e-30))
        if errors[name] <= 2 * errors[TORCH] + floor:
            seconds[name] = clock(lambda way=way: way(a_MK, b_KN, scratch, scale, add))  # type: ignore[misc]
    wrong = {name: error / max(errors[TORCH], floor) for name, error in errors.items() if name not in seconds}
    wrong = {name: times if times < ENDLESS else ENDLESS for name, times in wrong.items()}  # what is no number too
    return Timed(seconds, wrong, {name: error for name, error in errors.items() if error < ENDLESS})


def rounding(depth: int) -> float:
    """How far from fp32, relative, one unbroken sum of so many products may come on a tensor core.

    Every accumulation is cut off, always towards zero, so that the losses add up; emulated, a third of this.
    """
    return max(SLACK, depth / STEP * CUT)


def refusals() -> tuple[type[Exception], ...]:
    """What torch and Triton raise where they cannot compute something, memory that ended included."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError


def seconds_of(work: Callable[[], None]) -> float:
    """The median of some calls on a GPU, by CUDA events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    for _ in range(WARMUP):
        work()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in pairwise(events))
    return times[len(times) // 2] / 1e3
