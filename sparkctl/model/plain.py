"""transformers' GatedDeltaNet in plain torch, for models on a CPU.

transformers chooses at import: where fla or causal-conv1d is installed, its layer calls their kernels, which run on a
GPU alone, whatever device the model is on. The layer's own code with the torch functions that the choice replaced
gives the same numbers whether or not they are installed.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

SWAPPED = ("Qwen3_5GatedDeltaNet",)


def plain_layers(model: Any) -> Any:
    """`model`, each layer of `SWAPPED` in it made one of a plain subclass; parameters and names stay what they are."""
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in SWAPPED:
            module.__class__ = _plain_class(kind)
    return model


@cache
def _plain_class(kind: Any) -> type:
    """A subclass whose forward is that of `kind` on the functions beneath their decorators."""
    forward: Any = inspect.unwrap(kind.forward)
    beneath = {
        name: inspect.unwrap(value)
        for name in forward.__code__.co_names
        if isinstance(value := forward.__globals__.get(name), FunctionType)
    }
    plain = FunctionType(
        forward.__code__, {**forward.__globals__, **beneath}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    plain.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Plain{kind.__name__}", (kind,), {"forward": plain})
