"""Gradients of the references by autograd, for operators that have a forward and a backward function of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


class Tape:
    """A reference that was run, kept until its gradient is asked for; in inference mode nothing is kept."""

    def __init__(self, call: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> None:
        if torch.is_inference_mode_enabled():
            outputs = call(*inputs)
        else:
            with torch.enable_grad():
                self._leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                outputs = call(*self._leaves)
        self._outputs: Tensors = outputs if isinstance(outputs, tuple) else (outputs,)

    @property
    def outputs(self) -> Tensors:
        """What the reference gave."""
        return tuple(output.detach() for output in self._outputs)

    def gradients(self, *gradients: torch.Tensor) -> Tensors:
        """Of every input, for these of the outputs; once."""
        return torch.autograd.grad(self._outputs, self._leaves, gradients)
