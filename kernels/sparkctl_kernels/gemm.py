"""Products with an fp32 result, which torch spells differently on each device."""

from __future__ import annotations

import torch


def add_product(
    total_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, scale: float = 1.0, *, add: bool = True
) -> None:
    """total + scale · a·b in fp32, in place; without `add` what total holds is forgotten.

    On a GPU bf16 operands accumulate straight into the fp32 total: adding afterwards reads and writes it once more,
    4 ms a micro-step for the weight gradients of a 2B at an H200's bandwidth.
    """
    beta = 1.0 if add else 0.0
    if a_MK.is_cuda and a_MK.dtype != torch.float32:
        torch.addmm(total_MN, a_MK, b_KN, out_dtype=torch.float32, beta=beta, alpha=scale, out=total_MN)
    else:
        torch.addmm(total_MN, a_MK.float(), b_KN.float(), beta=beta, alpha=scale, out=total_MN)
