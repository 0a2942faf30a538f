"""The shapes that the kernels have to serve: the five Qwen3.5 sizes and the head layouts of the dense families."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Widths of one model. key_heads is 0 without GatedDeltaNet, whose heads have 128 dims; rotated: of head_dim."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    gated: bool
    normed: bool
    key_heads: int = 0
    value_heads: int = 0
    delta_dim: int = 128
    window: int | None = None


def _hybrid(name: str, hidden: int, ffn: int, heads: int, kv_heads: int, value_heads: int) -> Shape:
    return Shape(name, hidden, ffn, heads, kv_heads, 256, 64, True, True, 16, value_heads)


QWEN35 = (
    _hybrid("qwen3.5-0.8b", 1024, 3584, 8, 2, 16),
    _hybrid("qwen3.5-2b", 2048, 6144, 8, 2, 16),
    _hybrid("qwen3.5-4b", 2560, 9216, 16, 4, 32),
    _hybrid("qwen3.5-9b", 4096, 12288, 16, 4, 32),
    _hybrid("qwen3.5-27b", 5120, 17408, 24, 4, 48),
)
DENSE = (
    Shape("qwen2-0.5b", 896, 4864, 14, 2, 64, 64, False, False),
    Shape("qwen3-4b", 2560, 9728, 32, 8, 128, 128, False, True),
    Shape("llama-8b", 4096, 14336, 32, 8, 128, 128, False, False),
    Shape("mistral-7b", 4096, 14336, 32, 8, 128, 128, False, False, window=4096),
)
VOCABULARY = 248320
