"""What the native engine keeps from forward to backward, half by half, and has in hand at its worst moments.

Widths as in `memory`. On a GPU each moment is the sum of the tensors that the engine and its kernels make there, as
followed through its code (tests/allocations.py counts them); which of them is the worst depends on the model and on the
pack. Measured with its micro-step on an H200 (Qwen3.5-2B, 5,376 tokens; no optimiser, whose moments come on top): LoRA
r = 128 13.32 GiB, with checkpointing 5.97 GiB, full 26.85 GiB.
"""

from __future__ import annotations

from typing import NamedTuple

from sparkctl.hardware.load import BF16, FP32, Load
from sparkctl.hardware.shape import CHUNK, Shape

HEAD_ROWS = 1024  # label tokens whose logits are there at a time
# share of the tensors that glibc loses between them: small models (tests/peak_memory.py) peaked at 1.97 and 1.85 GB
# (hybrid, LoRA, four documents and one), 2.51 (full), 1.43 (llama, full), where the tensors and libraries make 1.99,
# 1.99, 2.47, 1.66
CPU_SLACK = 0.15
# the same of CUDA's allocator where a layer's blocks come and go between checkpoints: .34 and .41 to .42 (0.8B and 2B,
# LoRA and full, one document of 32,768 tokens, docs/performance.md)
CHECKPOINTING_SLACK = 0.38


class Kept(NamedTuple):
    """Bytes a token that the halves keep; stream: of the residual stream, which each of them keeps too."""

    stream: int
    attention: int
    rule: int
    feed: int

    @classmethod
    def of(cls, shape: Shape, load: Load) -> Kept:
        """A shape without GatedDeltaNet has no rule."""
        stream = (BF16 if load.mode == "lora" else FP32) * shape.hidden
        return cls(
            stream,
            attention_bytes(shape, load, stream),
            rule_bytes(shape, load, stream) if shape.rule_layers else 0,
            stream + 2 * BF16 * shape.ffn + 3 * BF16 * load.rank,
        )

    @property
    def layer(self) -> int:
        """Of the layer that keeps most."""
        return max(self.attention, self.rule) + self.feed

    def pack(self, shape: Shape, load: Load) -> int:
        """Of all layers at the end of forward; with checkpointing their inputs."""
        if load.checkpointing:
            return shape.layers * self.stream
        return shape.attention_layers * self.attention + shape.rule_layers * self.rule + shape.layers * self.feed


def saved(shape: Shape, load: Load) -> int:
    """Bytes of the worst moment beside the logits, which `logit_bytes` counts: what is kept and what is in hand."""
    if load.device == "cpu" or not (load.fla or not shape.rule_layers):
        return plain(shape, load)
    return max(at_head(shape, load), at_backward(shape, load) - logit_bytes(shape, load))


def logit_bytes(shape: Shape, load: Load) -> int:
    """On a GPU turned to their gradient in place."""
    return min(load.labels, HEAD_ROWS) * shape.vocabulary * BF16


def at_head(shape: Shape, load: Load) -> int:
    """Everything kept, and of label tokens what the head is given and gives."""
    kept = Kept.of(shape, load)
    return load.area * kept.pack(shape, load) + load.labels * (kept.stream + 2 * BF16 * shape.hidden)


def at_backward(shape: Shape, load: Load) -> int:
    """The worst of: a FFN's half, attention's, the delta rule's."""
    kept, area = Kept.of(shape, load), load.area
    low = 0 if load.mode == "lora" else BF16 * shape.hidden  # the gradient of the stream once more, in bf16
    always = area * (kept.pack(shape, load) + kept.stream + low) + load.labels * (2 * kept.stream + BF16 * shape.hidden)
    feed, attention, rule = (low + hand(shape, load) for hand in (feed_hand, attention_hand, rule_hand))
    if load.checkpointing:
        moments = (kept.layer + feed, kept.attention + attention, kept.rule + rule)
        return always + area * (max(moments) - kept.stream)
    behind = kept.attention + kept.feed  # of the last layer, which a hybrid's last rule comes before
    return always + area * max(feed, attention - kept.feed, rule - kept.feed - behind)


def plain(shape: Shape, load: Load) -> int:
    """Where plain torch computes: all that is kept, and what the worst half has in hand."""
    kept = Kept.of(shape, load)
    each = kept.pack(shape, load) + (kept.layer if load.checkpointing else 0)
    gradient = kept.stream + (0 if load.mode == "lora" else BF16 * shape.hidden)  # of the residual stream
    rows = 3 * kept.stream + 3 * BF16 * shape.hidden  # of label tokens, around the head
    return load.area * (each + gradient + in_hand(shape, load)) + load.labels * rows


def widening(shape: Shape, rank: int) -> int:
    """Values of the adapters' places in matrices that several projections share: every row has places for all of their
    adapters, and zeros in those of the others.
    """
    projected = (2 if shape.gated else 1) * shape.queries + 2 * shape.keys
    ruled = shape.convolved + shape.rule_values + 4 * shape.rule_heads
    each = 2 * shape.attention_layers * projected + shape.rule_layers * ruled + shape.layers * 2 * shape.ffn
    return rank * each


def attention_bytes(shape: Shape, load: Load, stream: int) -> int:
    """Bytes a token: the stream, the projections' output with a gate where there is one, the output of attention,
    queries and keys after the rotation, on a CPU the values once more, and A·x of the four adapters.
    """
    projected = (2 if shape.gated else 1) * shape.queries + 2 * shape.keys
    rotated = shape.queries + (2 if load.device == "cpu" else 1) * shape.keys
    own = stream + BF16 * (projected + shape.queries + rotated) + 4 * BF16 * load.rank
    if load.device == "cpu":  # keys and values for each query head, and autograd's copies of all of them
        own += BF16 * 4 * shape.queries
    return own


def rule_bytes(shape: Shape, load: Load, stream: int) -> int:
    """Bytes a token: the stream, the projections' output, the rule's output, A·x of three adapters; then what the rule
    keeps: by kernels the chunks' triangular systems, their states and the corrected values, or a tape of all its steps
    in fp32.
    """
    projected = shape.convolved + shape.rule_values + 2 * shape.rule_heads
    own = stream + BF16 * (projected + shape.rule_values) + 3 * BF16 * load.rank
    if load.device == "cuda" and load.fla:
        return own + (BF16 * CHUNK + 2 * FP32) * shape.rule_heads + BF16 * (states(shape, load) + shape.rule_values)
    return own + tape_bytes(shape)


def states(shape: Shape, load: Load) -> int:
    """Values a token of the delta rule's states, one a chunk."""
    state = shape.rule_keys * shape.rule_values // max(shape.rule_heads, 1)
    return state * max(load.chunks, -(-load.area // CHUNK)) // load.area


def tape_bytes(shape: Shape) -> int:
    """Bytes a token of the delta rule's reference under autograd, all in fp32."""
    state = shape.rule_keys * shape.rule_values // shape.rule_heads
    squares = CHUNK * shape.rule_heads
    return FP32 * (8 * shape.rule_keys + 8 * shape.rule_values + 6 * squares + 3 * state // CHUNK)


def feed_hand(shape: Shape, load: Load) -> int:
    """Bytes a token: the inputs of down and of gate and up once more, beside their adapters' products."""
    return BF16 * (shape.ffn + shape.hidden + 3 * load.rank)


def attention_hand(shape: Shape, load: Load) -> int:
    """Bytes a token: the input of o, gradients of all projections, of the output, of queries and keys, and of keys and
    values for each query head (not so on a Spark).

    FlashAttention-2 has values' gradients of its own; so that it adds in one order it makes the queries' gradient in
    fp32, split over the multiprocessors that the heads leave idle: 14 times where one document has 8 heads on 108.
    """
    queries, keys = shape.queries, shape.keys
    projected = (2 if shape.gated else 1) * queries + 2 * keys
    own = BF16 * (projected + (3 if shape.gated else 2) * queries + keys + load.rank) + FP32 * shape.heads
    own += BF16 * 2 * queries if keys < queries else 0
    if not load.multiprocessors:
        return own
    documents = -(-load.area // max(load.longest, 1))
    splits = -(-load.multiprocessors // (documents * shape.heads))
    return own + BF16 * keys + FP32 * splits * queries


def rule_hand(shape: Shape, load: Load) -> int:
    """Bytes a token of the delta rule's kernels: gradients of the projections, what the convolution gave, the
    gradients of all chunks' states, and five tensors as wide as its keys and six as its values.
    """
    if not shape.rule_layers:
        return 0
    wide = 2 * shape.convolved + 6 * shape.rule_values + 5 * shape.rule_keys + states(shape, load)
    return BF16 * (wide + load.rank + 2 * shape.rule_heads) + 3 * FP32 * shape.rule_heads


def passing(shape: Shape, load: Load) -> int:
    """Bytes a token of a forward that keeps nothing: a layer's tensors, and what its rule has in hand."""
    rule = shape.convolved + shape.rule_keys + 2 * shape.rule_values + states(shape, load) if shape.rule_layers else 0
    return Kept.of(shape, load).layer + BF16 * (2 * shape.hidden + max(rule, shape.ffn))


def in_hand(shape: Shape, load: Load) -> int:
    """Bytes a token of a half's backward in plain torch: gradients as wide as the FFN, or those of the delta rule."""
    wide = BF16 if load.device == "cuda" else 3 * FP32  # a CPU computes elementwise work in fp32
    feed = wide * shape.ffn + 2 * BF16 * shape.hidden
    return max(feed, BF16 * (2 * shape.convolved + shape.rule_values)) if shape.rule_layers else feed
