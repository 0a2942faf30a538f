"""What training an MTP head costs beside the training of its model: operations a token, peak memory."""

from __future__ import annotations

from dataclasses import replace

from sparkctl.hardware import native
from sparkctl.hardware.load import BF16, FP32, Load
from sparkctl.hardware.memory import CUDA_RUNTIME, cpu_runtime
from sparkctl.hardware.shape import Shape

WIDE = 3 * FP32  # bytes a query's value of a later step's attention in plain torch
BLOCK = 256  # queries whose scores it has at a time
CPU_LOGITS = 2 * BF16 + 5 * FP32  # bytes a logit there: teacher and student, then both in fp32 and what becomes of them


def operations(
    shape: Shape, label_share: float, steps: int, *, everywhere: bool = False, checkpointing: bool = False
) -> float:
    """Floating-point operations a token: the frozen model forward, the head forward and backward at each draft step,
    and on label tokens lm_head once for the teacher, forward and backward for each step.

    The head makes the first step's keys of every token, all else where a label token is guessed; `everywhere`: of every
    token too. checkpointing: of the loss, whose logits are then made twice.
    """
    share = 1.0 if everywhere else label_share
    first, rest = projections(shape), parameters(shape) - projections(shape)
    head = first + rest * share + (steps - 1) * (first + rest) * share
    vocabulary = 2.0 * shape.head_parameters * label_share
    logits = (1 + steps) * (2 if checkpointing else 1)
    return 2.0 * shape.layer_parameters + 6.0 * head + vocabulary * (logits + steps)


def projections(shape: Shape) -> int:
    """Parameters of the head up to queries, gates, keys and values."""
    return 2 * shape.hidden**2 + shape.hidden * (2 * shape.queries + 2 * shape.keys)


def parameters(shape: Shape) -> int:
    """Of the head: its projections, the output of attention and the FFN; norms are not worth counting."""
    return projections(shape) + shape.hidden * shape.queries + 3 * shape.hidden * shape.ffn


def peak(
    shape: Shape, area: int, longest: int, labels: int, steps: int, device: str, *, fla: bool,
    multiprocessors: int = 0, chunks: int = 0,
) -> int:  # fmt: skip
    """Peak bytes: the frozen model, the head with masters, gradients, moments and rounded copies, what all draft steps
    keep, a chunk of logits of the teacher and of one student, and the frozen model's layer in hand.

    area: tokens of a pack, of which `labels` are trained; longest: those of the longest document;
    multiprocessors, chunks: see `Load`. The demo's head peaked at 821 MB on a CPU.
    """
    frozen = shape.parameters * BF16 + shape.float32_parameters * (FP32 - BF16)
    head = parameters(shape) * (4 * FP32 + BF16)
    load = Load("lora", 0, 0, area, longest, labels, True, device, fla, "native", multiprocessors, chunks)
    drafts = kept(shape, area, labels, steps, device)
    if device == "cuda":
        backward = max(
            2 * min(labels, native.HEAD_ROWS) * shape.vocabulary * BF16, area * native.attention_hand(shape, load)
        )
        return int(frozen + head + max(drafts + backward, area * native.passing(shape, load)) + CUDA_RUNTIME)
    logits = min(labels, native.HEAD_ROWS) * shape.vocabulary * CPU_LOGITS
    forward = native.saved(shape, replace(load, labels=0)) - area * shape.layers * BF16 * shape.hidden  # of one layer
    tensors = logits + max(drafts + scores(shape, area, longest, steps), forward)
    return int(frozen + head + (1 + native.CPU_SLACK) * tensors + cpu_runtime(shape))


def scores(shape: Shape, area: int, longest: int, steps: int) -> int:
    """Bytes that the later steps' attention keeps in plain torch: of each block of queries the probabilities, and what
    of them weighs the keys before it; and those keys and values, in fp32.
    """
    seen = area * (longest + BLOCK) // 2  # pairs of a query and a key before it, where every document is the longest
    return (steps - 1) * seen * 2 * FP32 * (shape.heads + shape.queries // BLOCK)


def kept(shape: Shape, area: int, labels: int, steps: int, device: str) -> int:
    """Bytes that the draft steps keep, and their states' gradients: of every token what leads to the first step's keys,
    and a place for queries and outputs a step; all else of label tokens.

    Listed with `torch.autograd.graph.saved_tensors_hooks` on the kernels' path, 8,192 tokens and three steps, without
    the gradients: 1.16 GB at the 2B's shape with labels on 35 %, 2.35 on all; 3.15 and 6.37 GB at the 27B's. The sum
    below gives 1.16 and 2.37; 3.14 and 6.43.
    """
    hidden, queries, keys, ffn = shape.hidden, shape.queries, shape.keys, shape.ffn
    everywhere = 6 * hidden + 2 * queries + 4 * keys + steps * 2 * queries
    first = 3 * hidden + 3 * queries + 2 * ffn
    later = 8 * hidden + 6 * queries + 7 * keys + 2 * ffn
    each = first + (steps - 1) * later + steps * hidden
    wide = WIDE * steps * area * queries if device == "cpu" else 0
    return BF16 * (area * everywhere + labels * each) + wide
