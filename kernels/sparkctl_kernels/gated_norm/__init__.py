"""GatedDeltaNet's output norm: RMSNorm per head, times SiLU of the gate."""

from sparkctl_kernels.gated_norm.op import choice, gated_norm

__all__ = ["choice", "gated_norm"]
