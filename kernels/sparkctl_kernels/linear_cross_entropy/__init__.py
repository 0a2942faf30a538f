"""The head and its loss on label tokens only, without keeping logits."""

from sparkctl_kernels.linear_cross_entropy.op import choice, linear_cross_entropy

__all__ = ["choice", "linear_cross_entropy"]
