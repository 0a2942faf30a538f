"""What the native engine keeps from forward to backward, half by half, and has in hand at its worst moment.

Widths as in `memory`. Measured with its micro-step on an H200 (Qwen3.5-2B, 5,376 tokens; no optimiser, whose moments
come on top): LoRA r = 128 12.54 GiB, with checkpointing 6.49 GiB, full 26.05 GiB.
"""

from __future__ import annotations

from sparkctl.hardware.load import BF16, FP32, Load
from sparkctl.hardware.shape import CHUNK, Shape

HEAD_ROWS = 1024  # label tokens whose logits are there at a time
# share of the tensors that glibc loses between them: small models (tests/peak_memory.py) peaked at 1.97 and 1.85 GB
# (hybrid, LoRA, four documents and one), 2.51 (full), 1.43 (llama, full), where the tensors and libraries make 1.99,
# 1.99, 2.47, 1.66
CPU_SLACK = 0.15


def saved(shape: Shape, load: Load) -> int:
    """Bytes that the halves keep, and those in hand while the worst of them runs backward.

    With checkpointing: each layer's input, and everything of the one layer that is being computed again.
    """
    stream = BF16 if load.mode == "lora" else FP32
    feed = stream * shape.hidden + 2 * BF16 * shape.ffn + 3 * BF16 * load.rank
    attention = attention_bytes(shape, load, stream) + feed
    rule = rule_bytes(shape, load, stream) + feed if shape.rule_layers else 0
    if load.checkpointing:
        each = shape.layers * stream * shape.hidden + max(attention, rule)
    else:
        each = shape.attention_layers * attention + shape.rule_layers * rule
    gradient = (stream + (0 if load.mode == "lora" else BF16)) * shape.hidden  # of the residual stream
    rows = (3 * stream + 3 * BF16) * shape.hidden  # of label tokens, around the head
    return load.area * (each + gradient + in_hand(shape, load)) + load.labels * rows


def attention_bytes(shape: Shape, load: Load, stream: int) -> int:
    """Bytes a token: the stream, the projections' output with a gate where there is one, the output of attention,
    queries and keys after the rotation, the values once more, and A·x of the four adapters.
    """
    projected = (2 if shape.gated else 1) * shape.queries + 2 * shape.keys
    rotated = shape.queries + 2 * shape.keys
    own = stream * shape.hidden + BF16 * (projected + shape.queries + rotated) + 4 * BF16 * load.rank
    if load.device == "cpu":  # keys and values for each query head, and autograd's copies of all of them
        own += BF16 * 4 * shape.queries
    return own


def rule_bytes(shape: Shape, load: Load, stream: int) -> int:
    """Bytes a token: the stream, the projections' output, the rule's output, A·x of three adapters; then what the rule
    keeps: the chunks' triangular systems by kernels, or a tape of all its steps in fp32.
    """
    projected = shape.convolved + shape.rule_values + 2 * shape.rule_heads
    own = stream * shape.hidden + BF16 * (projected + shape.rule_values) + 3 * BF16 * load.rank
    if load.device == "cuda" and load.fla:
        return own + (BF16 * CHUNK + 2 * FP32) * shape.rule_heads
    return own + tape_bytes(shape)


def tape_bytes(shape: Shape) -> int:
    """Bytes a token of the delta rule's reference under autograd, all in fp32."""
    state = shape.rule_keys * shape.rule_values // shape.rule_heads
    squares = CHUNK * shape.rule_heads
    return FP32 * (8 * shape.rule_keys + 8 * shape.rule_values + 6 * squares + 3 * state // CHUNK)


def in_hand(shape: Shape, load: Load) -> int:
    """Bytes a token of a half's backward: gradients as wide as the FFN, or those of the delta rule's kernels."""
    wide = BF16 if load.device == "cuda" else 3 * FP32  # a CPU computes elementwise work in fp32
    feed = wide * shape.ffn + 2 * BF16 * shape.hidden
    if not shape.rule_layers:
        return feed
    state = shape.rule_keys * shape.rule_values // shape.rule_heads
    kernels = 12 * shape.rule_values + 2 * state // CHUNK if load.device == "cuda" else 0
    return max(feed, BF16 * (2 * shape.convolved + shape.rule_values + kernels))
