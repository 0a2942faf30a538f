"""The matrix products of the linear layers: the one place that says which kernel computes them.

By itself every product is torch's, which is cuBLAS on a GPU. Where another way was measured to be faster for a shape,
and no less right, a training may be pinned to it: `ways` does both. M rows · N columns · K summed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sparkctl_kernels.dispatch import fused

PREFIX = "gemm"  # of a product's name among the choices of a run


class Product(NamedTuple):
    """What decides how long it takes. kind: nt (b is a transposed view), nn, tn (a is: the gradient of a weight);
    `+` where an output is added to. The count of tokens among the sizes is rounded up, since packs differ in length.
    """

    kind: str
    rows: int
    columns: int
    depth: int

    def __str__(self) -> str:
        return f"{PREFIX} {self.kind} {self.rows}x{self.columns}x{self.depth}"

    @classmethod
    def parse(cls, name: str) -> Product:
        """From its name."""
        _, kind, sizes = name.split(" ")
        return cls(kind, *(int(size) for size in sizes.split("x")))

    @classmethod
    def of(cls, a_MK: torch.Tensor, b_KN: torch.Tensor, add: bool = False) -> Product:
        """The product a·b: which of the two is transposed shows in its strides."""
        (rows, depth), columns = a_MK.shape, b_KN.shape[1]
        if a_MK.stride(1) != 1:
            return cls("tn", rows, columns, bucket(depth))
        kind = "nn" if b_KN.stride(1) == 1 else "nt"
        return cls(kind + "+" * add, bucket(rows), columns, depth)


Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], None]  # a, b, c: c = scale · a·b [+ c]
pinned: dict[Product, Way] = {}  # what is not torch's
watch: Callable[[Product, torch.Tensor, torch.Tensor, torch.Tensor | None, float, bool], None] | None = None


def product(
    a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor | None = None, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """a·b in their dtype, plus a bias, rounded once; `out` may be part of a wider buffer."""
    way = _way(a_MK, b_KN, out_MN, 1.0, False) if pinned or watch else None
    if way is not None:
        out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1]) if out_MN is None else out_MN
        if bias_N is not None:
            out_MN.copy_(bias_N)
        way(a_MK, b_KN, out_MN, 1.0, bias_N is not None)
        return out_MN
    if bias_N is not None:
        return torch.addmm(bias_N, a_MK, b_KN, out=out_MN)
    return torch.mm(a_MK, b_KN, out=out_MN)


def add_to(c_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """c + a·b in their dtype, in place; c may be part of a wider buffer."""
    way = _way(a_MK, b_KN, c_MN, 1.0, True) if pinned or watch else None
    if way is not None:
        way(a_MK, b_KN, c_MN, 1.0, True)
    else:
        c_MN.addmm_(a_MK, b_KN)


def add_product(
    total_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, scale: float = 1.0, *, add: bool = True
) -> None:
    """total + scale · a·b in fp32, in place; without `add` what total holds is forgotten."""
    way = (_way(a_MK, b_KN, total_MN, scale, add) if pinned or watch else None) or by_torch
    way(a_MK, b_KN, total_MN, scale, add)


def by_torch(a_MK: torch.Tensor, b_KN: torch.Tensor, c_MN: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """c = scale · a·b, or c + scale · a·b, by cuBLAS on a GPU; c in their dtype or fp32.

    On a GPU bf16 operands accumulate straight into an fp32 c: adding afterwards reads and writes it once more, 4 ms a
    micro-step for the weight gradients of a 2B at an H200's bandwidth.
    """
    beta = 1.0 if add else 0.0
    if c_MN.dtype == a_MK.dtype:
        torch.addmm(c_MN, a_MK, b_KN, beta=beta, alpha=scale, out=c_MN)
    elif a_MK.is_cuda:
        torch.addmm(c_MN, a_MK, b_KN, out_dtype=c_MN.dtype, beta=beta, alpha=scale, out=c_MN)
    else:
        torch.addmm(c_MN, a_MK.float(), b_KN.float(), beta=beta, alpha=scale, out=c_MN)


def bucket(tokens: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << max(tokens - 1, 1).bit_length()
    return 3 * power // 4 if tokens <= 3 * power // 4 else power


def _way(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, scale: float, add: bool) -> Way | None:
    """The way that is pinned for this product; None: as ever. An fp32 total is one product, begun anew or added to.

    Of fp32 operands, which proofs alone have, a GPU has no other way than torch's.
    """
    if not fused(a) or (a.is_cuda and a.dtype == torch.float32):
        return None
    key = Product.of(a, b, add and c is not None and c.dtype == a.dtype)
    if watch is not None:
        watch(key, a, b, c, scale, add)
        return None
    return pinned.get(key)
