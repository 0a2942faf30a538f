"""Projections that share an input, with adapters or trained whole."""

from sparkctl_kernels.lora_linear.layer import Projection, SharedInputLinear, choice
from sparkctl_kernels.lora_linear.op import lora_linear

__all__ = ["Projection", "SharedInputLinear", "choice", "lora_linear"]
