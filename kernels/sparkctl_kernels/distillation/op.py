"""Distillation through the head in chunks of target tokens: logits live for one chunk, a teacher's and one student's.

Logits are rounded to the inputs' dtype, as an lm_head in that dtype rounds them; softmax is fp32, by Triton on a GPU,
by torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference

# N target tokens · T rows of a student's states · D hidden · V vocabulary
CHUNK = 1024  # rows: 0.5 GB of bf16 logits each at V = 248,320, and GEMMs long enough to run at full rate


class Student(NamedTuple):
    """states [T, D] of which row rows[n] (int64 [N]) guesses what target n's teacher says; present (fp32 [N]) is 0
    where there is no such row, and any row may be named. weight: of its losses in the whole.

    gradient [T, D]: scale · weight times the gradient of the states is added to it; None where none is wanted.
    """

    states: torch.Tensor
    rows: torch.Tensor
    present: torch.Tensor
    weight: float
    gradient: torch.Tensor | None = None


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("distillation", device)


def forward(
    teacher_ND: torch.Tensor, weight_VD: torch.Tensor, students: Sequence[Student], scale: float, chunk: int = CHUNK
) -> torch.Tensor:
    """Σ over targets of KL(teacher ‖ student), fp32, one sum a student: [students], unweighted and unscaled.

    The teacher is made once a chunk and held against every student; nothing reaches it or the weight. `scale` is
    applied before the gradients are rounded.
    """
    losses = torch.empty(len(students), len(teacher_ND), dtype=torch.float32, device=teacher_ND.device)
    for start in range(0, len(teacher_ND), chunk):
        some = slice(start, start + chunk)
        teacher = teacher_ND[some] @ weight_VD.T
        sums = _log_sums(teacher)
        for number, student in enumerate(students):
            rows, gradient = student.rows[some], student.gradient
            logits = student.states[rows] @ weight_VD.T
            factor = scale * student.weight
            to = student.present[some], losses[number, some], factor, gradient is not None
            _divergence_(logits, teacher, sums, *to)
            if gradient is not None:
                gradient.index_add_(0, rows, logits @ weight_VD)  # rows that are present are named once each
            del logits  # before the next student's are made
        del teacher
    return losses.sum(1)


def _log_sums(teacher_NV: torch.Tensor) -> torch.Tensor | None:
    """log Σ exp of each row, once for all students; None where torch makes it for each of them."""
    if not fused(teacher_NV):
        return None
    from sparkctl_kernels.distillation import kernel

    return kernel.log_sums(teacher_NV)


def _divergence_(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, teacher_sums_N: torch.Tensor | None, present_N: torch.Tensor,
    losses_N: torch.Tensor, scale: float, gradient: bool,
) -> None:  # fmt: skip
    """Losses of the rows; the student's logits become their gradient."""
    if teacher_sums_N is not None:
        from sparkctl_kernels.distillation import kernel

        kernel.divergence_(student_NV, teacher_NV, teacher_sums_N, present_N, losses_N, scale, gradient)
        return
    log_q, log_p = student_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    p = log_p.exp()
    losses_N.copy_((p * (log_p - log_q)).sum(-1) * present_N)
    if gradient:
        student_NV.copy_(log_q.exp_().sub_(p).mul_((present_N * scale)[:, None]))
