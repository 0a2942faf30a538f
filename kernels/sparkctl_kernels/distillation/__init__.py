"""Students' distance from a teacher's distribution over the vocabulary, without keeping logits."""

from sparkctl_kernels.distillation.op import Student, choice, forward

__all__ = ["Student", "choice", "forward"]
