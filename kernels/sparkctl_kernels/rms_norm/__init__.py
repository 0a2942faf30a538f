"""RMSNorm, alone or with the residual addition before it."""

from sparkctl_kernels.rms_norm.op import add_rms_norm, choice, rms_norm

__all__ = ["add_rms_norm", "choice", "rms_norm"]
