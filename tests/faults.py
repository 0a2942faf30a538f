"""An operator of the native engine, wrong by one per cent: in what it returns, or in what it writes to a buffer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch

TIMES = 1.01


@dataclass(frozen=True)
class Fault:
    """`function` of an operator's module ("layer" for the linear layers' class) times 1.01.

    of: which of the results, 0 where there is one. into: the argument that is written to; what it held before stays
    out of it where `added`.
    """

    operator: str
    function: str
    of: int | None = None
    into: str | None = None
    added: bool = False

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Wrong for the length of the block."""
        owner: Any = import_module(f"sparkctl_kernels.{self.operator}.{'layer' if self._linear else 'op'}")
        owner = owner.SharedInputLinear if self._linear else owner
        real = getattr(owner, self.function)
        signature = inspect.signature(real)

        def wrong(*arguments: Any, **named: Any) -> Any:
            if self.into is None:
                return self._scaled(real(*arguments, **named))
            buffer = signature.bind(*arguments, **named).arguments.get(self.into)
            before = buffer.clone() if buffer is not None and self.added else None
            result = real(*arguments, **named)
            if buffer is not None:  # a gradient that was asked for
                buffer.mul_(TIMES).sub_(0 if before is None else before * (TIMES - 1))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, self.function, wrong)
            yield

    @property
    def _linear(self) -> bool:
        return self.operator == "lora_linear"

    def _scaled(self, result: Any) -> Any:
        if not isinstance(result, tuple):
            return None if result is None else result * TIMES
        return tuple(x * TIMES if i == self.of and isinstance(x, torch.Tensor) else x for i, x in enumerate(result))
