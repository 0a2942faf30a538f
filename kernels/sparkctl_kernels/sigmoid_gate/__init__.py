"""The attention output times the sigmoid of its gate."""

from sparkctl_kernels.sigmoid_gate.op import choice, sigmoid_gate

__all__ = ["choice", "sigmoid_gate"]
