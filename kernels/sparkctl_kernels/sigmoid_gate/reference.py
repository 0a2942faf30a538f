"""x · σ(gate) in plain torch."""

from __future__ import annotations

import torch


def sigmoid_gate(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
    """x · σ(gate), the sigmoid rounded to the dtype first, as transformers does."""
    return x_TNH * torch.sigmoid(gate_TNH)
