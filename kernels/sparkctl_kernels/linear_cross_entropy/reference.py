"""Logits and cross-entropy in plain torch: bf16 GEMM, fp32 softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# N label tokens · D hidden · V vocabulary


def linear_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of -log softmax(hidden · weightᵀ)[label], fp32. Logits are rounded to the inputs' dtype, as an
    lm_head in that dtype rounds them."""
    logits = hidden_ND @ weight_VD.T
    return F.cross_entropy(logits.float(), labels_N.long(), reduction="sum")
