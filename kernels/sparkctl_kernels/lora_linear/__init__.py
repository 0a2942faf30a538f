"""Projections that share an input, with adapters or trained whole."""

from sparkctl_kernels.lora_linear.layer import Projection, SharedInputLinear, choice

__all__ = ["Projection", "SharedInputLinear", "choice"]
