"""An operator of the native engine, wrong by one per cent: in what it returns, or in what it writes to a buffer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

TIMES = 1.01
LINEAR = "lora_linear"
FUNCTIONS = ("forward", "backward", "backward_")
METHODS = ("forward", "input_gradient", "adapter_gradient", "add_weight_gradients")


@dataclass(frozen=True)
class Fault:
    """`function` of an operator's module ("layer" for the linear layers' class) times 1.01.

    of: which of the results, 0 where there is one. into: the argument that is written to. master: which of every
    projection's masters is given a gradient ("lora_a", "bias" …).
    """

    operator: str
    function: str
    of: int | None = None
    into: str | None = None
    master: str | None = None

    @property
    def result(self) -> str:
        """What of the function is wrong."""
        return self.into or self.master or str(self.of)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Wrong for the length of the block."""
        owner = owner_of(self.operator)
        real = getattr(owner, self.function)
        signature = inspect.signature(real)

        def wrong(*arguments: Any, **named: Any) -> Any:
            if self.master is not None:
                real(*arguments, **named)
                scale_gradients(arguments[0].projections, self.master)
                return None
            if self.into is None:
                return self._scaled(real(*arguments, **named))
            buffer = signature.bind(*arguments, **named).arguments.get(self.into)
            result = real(*arguments, **named)
            if buffer is not None:  # a gradient that was asked for
                buffer.mul_(TIMES)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, self.function, wrong)
            yield

    def _scaled(self, result: Any) -> Any:
        if not isinstance(result, tuple):
            return None if result is None else result * TIMES
        return tuple(x * TIMES if i == self.of and isinstance(x, torch.Tensor) else x for i, x in enumerate(result))


def in_another_process(arguments: str) -> str:
    """Lines that plant `Fault(ARGUMENTS)` in the process that runs them, to its end."""
    return (
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from faults import Fault\n"
        f"planted = Fault({arguments}).planted()\n"
        "planted.__enter__()\n"
    )


def owner_of(operator: str) -> Any:
    """What has an operator's functions: its module, or the linear layers' class."""
    module: Any = import_module(f"sparkctl_kernels.{operator}.{'layer' if operator == LINEAR else 'op'}")
    return module.SharedInputLinear if operator == LINEAR else module


@contextmanager
def watched(operators: set[str]) -> Iterator[set[tuple[str, str, str]]]:
    """(operator, function, result) of all that their functions return, write to and add to masters in the block.

    Results are called as in `Fault.result`.
    """
    found: set[tuple[str, str, str]] = set()
    with pytest.MonkeyPatch.context() as patch:
        for operator in operators:
            owner = owner_of(operator)
            for function in METHODS if operator == LINEAR else FUNCTIONS:
                if hasattr(owner, function):
                    patch.setattr(owner, function, _watching(operator, getattr(owner, function), found))
        yield found


def _watching(operator: str, real: Any, found: set[tuple[str, str, str]]) -> Any:
    signature = inspect.signature(real)

    def watching(*arguments: Any, **named: Any) -> Any:
        given = {n: x for n, x in signature.bind(*arguments, **named).arguments.items() if isinstance(x, torch.Tensor)}
        masters = [vars(p) for p in getattr(arguments[0], "projections", ())]
        before = {name: x._version for name, x in given.items()}
        result = real(*arguments, **named)
        results = result if isinstance(result, tuple) else (result,)
        names = {str(i) for i, x in enumerate(results) if isinstance(x, torch.Tensor)}
        names |= {name for name, x in given.items() if x._version > before[name]}
        if result is None:
            names |= {n for m in masters for n, x in m.items() if getattr(x, "grad", None) is not None}
        found.update((operator, real.__name__, name) for name in names)
        return result

    return watching


def scale_gradients(projections: tuple[Any, ...], master: str) -> None:
    """After the first micro-step: of those that are trained."""
    for projection in projections:
        gradient = getattr(getattr(projection, master), "grad", None)
        if gradient is not None:
            gradient.mul_(TIMES)
