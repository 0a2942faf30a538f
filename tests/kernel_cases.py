"""What a kernel test compares: an operator as the engine calls it, beside its reference under autograd.

A case runs with outputs filled with NaN that are parts of wider buffers, inputs that begin at odd offsets, odd lengths.
`plants` says how an error of 1 % is put into the running operator, for each of its results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

Tensors = dict[str, torch.Tensor]
PLANTED = 1.01
LOW = 1e-3  # of the square norm that a stretch is relative to
FLOOR = 1.0  # of the norm that an error is relative to: some gradients are 0 but for rounding


@dataclass(frozen=True)
class Plant:
    """Where a result is from: `function` of `module` writes it to its argument `at`, or returns it (`of` a tuple)."""

    module: str
    function: str
    at: int | str | None = None
    of: int | None = None

    @contextmanager
    def planted(self, times: float = PLANTED) -> Iterator[None]:
        """The operator runs, and this result of it is off by 1 %."""
        module = importlib.import_module(f"sparkctl_kernels.{self.module}")
        real = getattr(module, self.function)

        def wrong(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            found = result if self.of is None else result[self.of]
            if self.at is not None:
                found = named[self.at] if isinstance(self.at, str) else arguments[self.at]
            if found is not None:  # a gradient that was not asked for
                found.mul_(times)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, self.function, wrong)
            yield


@dataclass(frozen=True, eq=False)
class Case:
    """`fused` runs the operator below autograd, `reference` the plain torch; both give every result by name."""

    name: str
    inputs: Callable[[], Tensors]
    fused: Callable[[Tensors], Tensors]
    reference: Callable[[Tensors], Tensors]
    plants: dict[str, Plant] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()  # inputs that stay fp32 in bf16 runs


def randn(*shape: int, std: float = 1.0) -> torch.Tensor:
    """Random values in a view that begins at an odd offset: nothing may rely on alignment."""
    count = torch.Size(shape).numel()
    return (std * torch.randn(count + 3))[3:].view(shape)


class Wide:
    """A [rows, columns] part of a wider buffer full of NaN; `check` sees that nothing was written beside it."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor) -> None:
        self.whole = torch.full((rows, columns + 5), float("nan"), dtype=like.dtype, device=like.device)
        self.part = self.whole[:, 2 : 2 + columns]

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The part, holding `values`."""
        self.part.copy_(values)
        return self.part

    def check(self) -> None:
        """Every value of the part was written, none beside it."""
        assert self.whole[:, :2].isnan().all()
        assert self.whole[:, 2 + self.part.shape[1] :].isnan().all()
        assert not self.part.isnan().any()


def blank(like: torch.Tensor) -> torch.Tensor:
    return torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device)


def output_gradient(shape: torch.Size | tuple[int, ...], like: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """The same for operator and reference, whatever the dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def autograd(
    call: Callable[..., Any], inputs: Tensors, outputs: tuple[str, ...], gradients: tuple[torch.Tensor, ...],
    names: dict[str, str],
) -> Tensors:  # fmt: skip
    """Outputs of `call` by name, and gradients of the inputs that `names` renames."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    found = call(**leaves)
    found = found if isinstance(found, tuple) else (found,)
    kept = [(output, d) for output, d in zip(found, gradients, strict=True)]
    grads = torch.autograd.grad([o for o, _ in kept], [leaves[name] for name in names], [d for _, d in kept])
    results = dict(zip(outputs, (o.detach() for o in found), strict=True))
    return results | dict(zip(names.values(), grads, strict=True))


def run(case: Case, call: Callable[[Tensors], Tensors], dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    """Results in fp32."""
    torch.manual_seed(seed)
    inputs = {n: t.to(device, torch.float32 if n in case.fixed else dtype) for n, t in case.inputs().items()}
    return {name: result.detach().float() for name, result in call(inputs).items()}


def distances(found: Tensors, truth: Tensors) -> dict[str, float]:
    assert set(found) == set(truth)
    assert all(found[name].shape == truth[name].shape for name in truth)
    assert [name for name in found if found[name].isnan().any()] == []  # max() would pass over them
    return {n: float((found[n] - truth[n]).norm() / truth[n].norm().clamp_min(FLOOR)) for n in truth}


def stretched(found: Tensors, truth: Tensors) -> dict[str, float]:
    """How much larger than the truth each result is as a whole. Roundings cancel out in it (up to 8e-4 were seen of
    bf16), so that it shows an error of 1 % which is smaller than the distances that they make."""
    return {
        n: float(((found[n] - truth[n]).double() * truth[n]).sum() / truth[n].double().square().sum().clamp_min(LOW))
        for n in truth
    }
