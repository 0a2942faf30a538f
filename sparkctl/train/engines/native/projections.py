"""From the model's nn.Linears to layers that share an input; masters and adapters stay one object each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sparkctl_kernels.lora_linear.layer import Copies, Projection, SharedInputLinear
from torch import nn


class Left:
    """A gradient as the last micro-step left it. Whoever steps writes to it: None, zeros, or what was clipped."""

    def __init__(self) -> None:
        self._gradient: torch.Tensor | None = None
        self._version = 0

    def note(self, gradient: torch.Tensor | None) -> None:
        """So it is left."""
        self._gradient, self._version = gradient, 0 if gradient is None else gradient._version

    def untouched(self, gradient: torch.Tensor | None) -> bool:
        """Whether there is one, and nobody has written to it since."""
        return gradient is not None and gradient is self._gradient and gradient._version == self._version


class Projections:
    """Makes the engine's linear layers and remembers them, so that all can be refreshed after an optimiser step.

    `adapters`: the module id of an nn.Linear → (A [r, K], B [N, r]), fp32 masters; absent for frozen projections.
    `trained`: the weights themselves are trained, as fp32 masters.
    """

    def __init__(
        self, adapters: Mapping[int, tuple[nn.Parameter, nn.Parameter]], scale: float, trained: bool, dtype: torch.dtype
    ) -> None:
        self._adapters, self._scale, self._trained, self._dtype = adapters, scale, trained, dtype
        self._copies: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self._versions: list[int] = []
        self._left = Left()
        self._rounding: Copies | None = None  # made when the last layer is

    def shared(self, *linears: nn.Linear) -> SharedInputLinear:
        """One layer for projections of the same input, whose outputs stand side by side."""
        projections = []
        for linear in linears:
            a, b = self._adapters.get(id(linear), (None, None))
            projections.append(Projection(linear.weight, linear.bias, a, b, self._trained))
        layer = SharedInputLinear(tuple(projections), self._scale, self._dtype)
        self._copies += layer.copies()
        return layer

    def copied(self, master: nn.Parameter) -> torch.Tensor:
        """A compute copy of a master that is no projection."""
        copy = torch.empty_like(master, dtype=self._dtype, requires_grad=False)
        self._copies.append((copy, master, 1.0))
        return copy

    @property
    def accumulating(self) -> bool:
        """Whether gradients wait for an optimiser, which then has not written since they were begun."""
        return self._left.untouched(self._gradient)

    def leave(self) -> None:
        """A micro-step has ended."""
        self._left.note(self._gradient)

    @property
    def _gradient(self) -> torch.Tensor | None:
        """One that every micro-step adds to."""
        return self._copies[0][1].grad if self._copies else None

    def refresh(self, stale: bool) -> None:
        """Bring the compute copies up to date with the masters, where `stale` or somebody has written to them since.

        Torch's fused AdamW leaves no trace in a tensor's version: after it `stale` must be said.
        """
        versions = [master._version for _, master, _ in self._copies]
        if versions != self._versions or stale:
            self._rounding = self._rounding or Copies(self._copies)
            self._rounding.round()
            self._versions = versions
