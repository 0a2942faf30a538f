"""Kullback-Leibler divergence of a student's distribution from a teacher's, in plain torch."""

from __future__ import annotations

import torch

# N target tokens · D hidden · V vocabulary


def divergence(student_ND: torch.Tensor, teacher_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each row, fp32 [N]: p = softmax(teacher · weightᵀ), q = softmax(student · weightᵀ).

    Logits are rounded to the inputs' dtype, as an lm_head in that dtype rounds them; the softmax is fp32.
    """
    log_p = (teacher_ND @ weight_VD.T).float().log_softmax(-1)
    log_q = (student_ND @ weight_VD.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
