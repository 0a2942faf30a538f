"""The head's loss in chunks of label tokens: logits live for one chunk, the gradients are made beside the loss.

Logits are rounded to the inputs' dtype, as an lm_head in that dtype rounds them; softmax is fp32, by Triton on a GPU,
by torch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused, triton_or_reference
from sparkctl_kernels.gemm import add_product
from sparkctl_kernels.linear_cross_entropy import reference

# N label tokens · D hidden · V vocabulary
CHUNK = 1024  # rows: 0.5 GB of bf16 logits at V = 248,320, and GEMMs long enough to run at full rate


def choice(device: torch.device) -> Choice:
    """Which kernel runs on `device`."""
    return triton_or_reference("linear_cross_entropy", device)


def forward(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, scale: float, *,
    dhidden_ND: torch.Tensor | None = None, dweight_VD: torch.Tensor | None = None, add: bool = True,
    chunk: int = CHUNK,
) -> torch.Tensor:  # fmt: skip
    """Σ of the rows' losses, fp32, unscaled. Writes scale times the gradient of the hidden rows; adds that of the
    weight (fp32) to dweight, or begins anew there unless `add`.

    `scale` is applied before the gradients are rounded, so that the usual 1 / label tokens costs no rounding.
    """
    losses = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
    gradient = dhidden_ND is not None or dweight_VD is not None
    for start in range(0, len(labels_N), chunk):
        some = slice(start, start + chunk)
        rows, logits = hidden_ND[some], hidden_ND[some] @ weight_VD.T
        _cross_entropy_(logits, labels_N[some], losses[some], scale, gradient)
        if dhidden_ND is not None:
            torch.mm(logits, weight_VD, out=dhidden_ND[some])
        if dweight_VD is not None:
            add_product(dweight_VD, logits.T, rows, add=add or start > 0)
        del logits  # before the next chunk's are made
    return losses.sum()


def _cross_entropy_(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, losses_N: torch.Tensor, scale: float, gradient: bool
) -> None:
    """Losses of the rows; the logits become their gradient."""
    if fused(logits_NV):
        from sparkctl_kernels.linear_cross_entropy import kernel

        kernel.cross_entropy_(logits_NV, labels_N, losses_N, scale, gradient)
        return
    labels, wide = labels_N.long()[:, None], logits_NV.float()
    log_sum = wide.logsumexp(dim=1, keepdim=True)
    losses_N.copy_((log_sum - wide.gather(1, labels))[:, 0])
    if gradient:
        dz = wide.sub_(log_sum).exp_()
        dz.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=dz.dtype))
        logits_NV.copy_(dz.mul_(scale))


@torch.library.custom_op("sparkctl::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, chunk: int, want: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dhidden = torch.empty_like(hidden)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if want else None
    loss = forward(hidden, weight, labels, scale, dhidden_ND=dhidden, dweight_VD=dweight, add=False, chunk=chunk)
    return loss * scale, dhidden, dweight if dweight is not None else hidden.new_empty(0, dtype=torch.float32)


@_operator.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, chunk: int, want: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden), hidden.new_empty(weight.shape if want else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, dhidden, dweight = output
    ctx.want, ctx.dtypes = inputs[-1], (inputs[0].dtype, inputs[1].dtype)
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.save_for_backward(dhidden, dweight)


def _backward(ctx: Any, d: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    dhidden, dweight = ctx.saved_tensors
    dw = (dweight * d).to(ctx.dtypes[1]) if ctx.want else None
    return (dhidden * d).to(ctx.dtypes[0]), dw, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, scale: float = 1.0, chunk: int = CHUNK
) -> torch.Tensor:
    """scale · `reference.linear_cross_entropy`, fp32. Every label is a real token. Gradients are made in forward."""
    if not fused(hidden_ND):
        return scale * reference.linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    hidden, labels = hidden_ND.contiguous(), labels_N.contiguous()
    loss, _, _ = _operator(hidden, weight_VD, labels, scale, chunk, weight_VD.requires_grad)
    return loss
