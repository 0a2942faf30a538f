"""From the projections' outputs to normed, rotated queries and keys, and the output gate."""

from sparkctl_kernels.qk_norm_rope.op import choice, qk_norm_rope

__all__ = ["choice", "qk_norm_rope"]
