"""SiLU(gate) · up as transformers computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# T tokens · F width of the feed-forward layer


def silu_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """SiLU of the left half times the right half; SiLU in fp32 and rounded to the input's dtype, as torch does."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate) * up
