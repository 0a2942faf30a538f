"""The memory model: what a training holds at its worst moment, cause by cause.

The worst moment is the end of a forward pass over a full pack while gradients of earlier packs wait: weights,
masters, gradients, both moments of AdamW, everything that autograd keeps for the backward pass, and the logits.

What autograd keeps was listed with `torch.autograd.graph.saved_tensors_hooks` on transformers 5.17 and peft 0.21
under bf16 autocast and is written below as bytes a token, by widths:

    D hidden   F FFN   Q queries   K keys (= values) of attention   r rank
    C convolved channels   X repeated keys   V values   H value heads   X·V/H the state, of GatedDeltaNet

Measured against it on an H200 (Qwen3.5-2B, 5,376 tokens, LoRA r = 128): 37.4 GiB with transformers, peft and fla and
all logits, 23.0 GiB with bf16 adapters and the logits of 35 % of the tokens in chunks.
"""

from __future__ import annotations

from dataclasses import replace

from sparkctl.hardware import native
from sparkctl.hardware.load import BF16, FP32, Load
from sparkctl.hardware.shape import CHUNK, Shape
from sparkctl.manifest.schema import MemoryTerms

LOGITS = 12  # bytes a logit at the start of backward: log-softmax, its gradient, and the gradient of the logits in fp32
# interpreter, torch, transformers, peft, and 64 compiled products of each of torch's caches (`env.keep_few_products`):
# a llama of two layers of 64 features peaked at 684 MB after 59 packs, the demo's hybrid at 981 MB after 100, which
# stood at 521 and 608 MB before the first. These figures make 791 and 974
CPU_RUNTIME, CPU_HYBRID = 700 << 20, 86 << 20
CUDA_RUNTIME = 1200 << 20  # the same, CUDA's context and cuBLAS workspaces
# share of activations and logits that CUDA's caching allocator loses between blocks: with .06 eleven trainings on an
# H200 (docs/performance.md) took up to 5.7 % more than was foretold, the most where documents are many; with .08 no
# more than 4.3
SLACK = 0.08
# the same of glibc's, which keeps what short-lived blocks leave between long-lived ones, checkpointing or not; by LoRA
# one small hybrid (tests/peak_memory.py) peaked at 2.47 to 2.85 GB in 16 runs, which .5 makes 2.69
CPU_SLACK = {"lora": 0.5, "full": 0.1}


def peak(shape: Shape, load: Load) -> MemoryTerms:
    """Peak bytes of a training step.

    LoRA: base in bf16 (tensors published in F32 stay so), adapters as fp32 masters, which autocast copies to bf16.
    Full: fp32 masters, which autocast copies to bf16. Gradients fp32, AdamW 2 x fp32.
    """
    base = shape.parameters * BF16 + shape.float32_parameters * (FP32 - BF16)
    if load.engine == "native" and load.mode == "lora":
        base += BF16 * native.widening(shape, load.rank)
    activations = saved(shape, load)
    logits = logit_bytes(shape, load)
    return MemoryTerms(
        weights=(base if load.mode == "lora" else 0) + load.trainable * BF16,
        masters=load.trainable * FP32,
        gradients=load.trainable * FP32,
        optimizer=load.trainable * 2 * FP32,
        activations=activations,
        logits=logits,
        runtime=runtime(shape, load, activations + logits),
    )


def logit_bytes(shape: Shape, load: Load) -> int:
    """All the logits, or the chunk of them that the native engine has at a time: on a GPU turned to their gradient in
    place.
    """
    if load.engine == "native" and load.device == "cuda":
        return native.logit_bytes(shape, load)
    if load.engine == "native":
        return min(load.labels, native.HEAD_ROWS) * shape.vocabulary * LOGITS
    return load.labels * shape.vocabulary * LOGITS


def runtime(shape: Shape, load: Load, tensors: int) -> int:
    """Libraries, and what the allocator of so many bytes of tensors loses."""
    if load.device == "cuda":
        own = load.engine == "native" and load.checkpointing
        return CUDA_RUNTIME + int((native.CHECKPOINTING_SLACK if own else SLACK) * tensors)
    libraries = cpu_runtime(shape)
    if load.engine == "native":
        return libraries + int(native.CPU_SLACK * tensors)
    everything = saved(shape, replace(load, checkpointing=False))
    return libraries + int(CPU_SLACK[load.mode] * everything)


def cpu_runtime(shape: Shape) -> int:
    """Libraries on a CPU, more of them and of their products for GatedDeltaNet."""
    return CPU_RUNTIME + (CPU_HYBRID if shape.rule_layers else 0)


def saved(shape: Shape, load: Load) -> int:
    """Bytes that autograd keeps from forward to backward.

    With checkpointing: each layer's input, and everything of the one layer that is being computed again.
    """
    if load.engine == "native":
        return native.saved(shape, load)
    attention, rule = attention_bytes(shape, load), rule_bytes(shape, load) if shape.rule_layers else 0
    ends = 4 * FP32 * shape.hidden  # the embedding's output and the last norm's
    if load.checkpointing:
        boundary = shape.hidden * (BF16 if load.mode == "lora" else FP32)
        each = shape.layers * boundary + max(attention, rule)
    else:
        each = shape.attention_layers * attention + shape.rule_layers * rule
    return load.area * (each + ends) + transient(shape, load)


def transient(shape: Shape, load: Load) -> int:
    """Bytes of the tensors in hand at once while a layer's backward runs: gradients as wide as the FFN."""
    return load.area * (6 * BF16 * shape.ffn + 4 * FP32 * shape.hidden)


def attention_bytes(shape: Shape, load: Load) -> int:
    """Bytes a token of an attention layer.

    Two norms in fp32 (8 D), the inputs of q, k, v, gate and up cast for each projection (10 D), SiLU, its product and
    the input of down (8 F), q, k, v and the output of attention (4 Q + 4 K), the input of o (2 Q); where heads are
    normalised their fp32 inputs (4 Q + 4 K); where the output is gated, gate and product (4 Q). Full fine-tuning has
    the residual stream in fp32 and keeps the norms' outputs for their own gradients. A batch of padded rows has a
    mask, which every attention layer turns into bf16 for itself: a row of it for each token. An adapter keeps A·x.
    """
    hidden, queries, keys = 18, 6, 4
    if shape.head_norms:
        queries, keys = queries + 4, keys + 4
    if shape.gated:
        queries += 4
    if load.mode == "full":
        hidden, queries, keys = hidden + 10, queries + 4, keys + 4
    adapters = 7 * BF16 * load.rank
    mask = BF16 * min(load.longest, load.area // 2)  # a row alone needs none
    return hidden * shape.hidden + 8 * shape.ffn + queries * shape.queries + keys * shape.keys + mask + adapters


def rule_bytes(shape: Shape, load: Load) -> int:
    """Bytes a token of a GatedDeltaNet layer: norms and FFN as above (16 D + 8 F), the convolution's input and
    output (4 C), and the delta rule: in torch, in fp32 and chunk by chunk, or fused.
    """
    hidden, values = (16, 0) if load.mode == "lora" else (28, 8)
    if load.fla:
        rule = 8 * shape.rule_keys + 20 * shape.rule_values
    else:
        state = shape.rule_keys * shape.rule_values // shape.rule_heads
        rule = 42 * shape.rule_keys + 28 * shape.rule_values + 14 * CHUNK * shape.rule_heads + 8 * state // CHUNK
    adapters = 6 * BF16 * load.rank
    return hidden * shape.hidden + 8 * shape.ffn + 4 * shape.convolved + rule + values * shape.rule_values + adapters
