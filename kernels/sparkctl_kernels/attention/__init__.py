"""Causal attention within the documents of a pack."""

from sparkctl_kernels.attention.op import attention, choice

__all__ = ["attention", "choice"]
