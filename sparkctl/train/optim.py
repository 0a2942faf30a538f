"""fp32 AdamW, the learning rate of a step, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparkctl.manifest.schema import Course

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(plan: Course, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up to the peak, then decay to the plan's share of it.

    The first step already learns, at peak / warmup_steps; the decay would reach its end at step `steps`.
    """
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, steps - plan.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if plan.schedule == "cosine" else 1 - done
    return plan.learning_rate * (plan.min_lr_fraction + (1 - plan.min_lr_fraction) * left)


class Optimizer:
    """AdamW over named fp32 masters. Moments exist from the start, so that a rehearsal meets their memory.

    Weight decay falls on what has two dims or more (matrices, embeddings, convolutions): norms, biases and the decay
    rates of GatedDeltaNet are left in peace.
    """

    def __init__(self, parameters: dict[str, Parameter], plan: Course) -> None:
        import torch

        self.parameters = parameters
        self._max_norm = plan.max_grad_norm
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # fused: one pass over each tensor, and the same bits at every call, on GPU and CPU
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=plan.learning_rate,
            betas=(plan.beta1, plan.beta2),
            eps=plan.epsilon,
            fused=True,
        )
        for parameter in parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def clip(self) -> torch.Tensor:
        """The gradients' global norm before clipping (0-dim fp32); they are scaled down to the plan's where above."""
        import torch

        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._max_norm, foreach=None)

    def step(self, rate: float) -> None:
        """One update at that learning rate; gradients are cleared."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def moments(self) -> Iterable[tuple[str, torch.Tensor]]:
        """("exp_avg.NAME", tensor), … in the parameters' order; the tensors are the live ones."""
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                yield f"{moment}.{name}", self._adamw.state[parameter][moment]

    def set_step(self, step: int) -> None:
        """Tell AdamW how many updates its moments have seen."""
        for parameter in self.parameters.values():
            self._adamw.state[parameter]["step"].fill_(step)
