"""SiLU(gate) · up, the middle of a gated feed-forward layer."""

from sparkctl_kernels.silu_mul.op import choice, silu_mul

__all__ = ["choice", "silu_mul"]
