"""A bf16 matrix product of this project, laid out for a GB10; opt-in."""

from sparkctl_kernels.matmul.op import choice, matmul

__all__ = ["choice", "matmul"]
