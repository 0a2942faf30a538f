"""The gated delta rule: GatedDeltaNet's recurrence, with its gates."""

from sparkctl_kernels.gated_delta.op import choice, gated_delta

__all__ = ["choice", "gated_delta"]
