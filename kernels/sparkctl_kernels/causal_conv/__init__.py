"""GatedDeltaNet's short causal convolution with SiLU, split into queries and keys of unit length, and values."""

from sparkctl_kernels.causal_conv.op import causal_conv, choice

__all__ = ["causal_conv", "choice"]
