"""What attention's forward keeps for its backward, a type for each kernel: the type says which backward takes it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# T tokens · N query heads · K kv heads · H head dim


class TritonKept(NamedTuple):
    """Of this project's kernel; the log-sum-exp in base 2, fp32."""

    q_TNH: torch.Tensor
    k_TKH: torch.Tensor
    v_TKH: torch.Tensor
    o_TNH: torch.Tensor
    log_sum_NT: torch.Tensor

    @property
    def unit(self) -> float:
        """What makes a natural logarithm of those in log_sum."""
        return math.log(2)


class FlashKept(NamedTuple):
    """Of torch's FlashAttention-2; the log-sum-exp natural, fp32. state, unused: what its dropout would draw from."""

    q_TNH: torch.Tensor
    k_TKH: torch.Tensor
    v_TKH: torch.Tensor
    o_TNH: torch.Tensor
    log_sum_NT: torch.Tensor
    state: torch.Tensor
    unused: torch.Tensor

    @property
    def unit(self) -> float:
        """What makes a natural logarithm of those in log_sum."""
        return 1.0
