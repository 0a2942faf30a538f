"""LoRA adapters, the same from the same seed whatever the engine, the device and the order in which they are made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sparkctl.errors import SparkError
from sparkctl.model.names import NameMap

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

# R rank · I in features · O out features

ADAPTER = "default"  # what peft calls the one adapter
A, B = ".lora_A.weight", ".lora_B.weight"


def add_adapters(model: Any, r: int, alpha: int, seed: int, targets: Sequence[str], name: str = "RUN") -> Any:
    """`model` (from load_text_model) as a peft model, fp32 adapters on every module whose last name is in `targets`.

    Adapters alone require gradients. Torch's random state is neither read nor moved. Raises SparkError where no
    module has such a name. name: the run in its hint.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if not any(name.rpartition(".")[2] in targets for name, _ in model.named_modules()):
        raise SparkError(
            f"the model has no module to adapt: none is called {', '.join(targets)}",
            f"train it whole: `sparkctl recommend {name} --mode full`",
        )
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=list(targets)
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        adapted: Any = get_peft_model(model, config)  # draws first weights of its own; ours replace them
    begin_adapters(adapted, seed)
    return adapted


def begin_adapters(model: Any, seed: int) -> None:
    """Give the adapters of a peft model the values that they begin with in every engine."""
    import torch

    with torch.no_grad():
        for path, layer in _layers(model):
            a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a_RI.copy_(initial_a(path, a_RI.shape[0], a_RI.shape[1], seed))
            b_OR.zero_()


def initial_a(path: str, r: int, width: int, seed: int) -> torch.Tensor:
    """fp32 [r, width] on the CPU, as peft draws it (Kaiming, so ±1/√width); B begins as zeros.

    path: the module's in the checkpoint. Each has a generator of its own, so no order matters.
    """
    import torch

    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(width)
    # in two roundings, which uniform_(-bound, bound) may fuse into one on some processors
    return torch.rand(r, width, dtype=torch.float32, generator=generator).mul_(2 * bound).sub_(bound)


def adapter_tensors(model: Any) -> dict[str, Parameter]:
    """The adapters of a peft model by the checkpoint's module paths, A before B, in the order of the layers."""
    found: dict[str, Parameter] = {}
    for path, layer in _layers(model):
        found[path + A], found[path + B] = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return found


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(the checkpoint's path, peft's layer) of each adapted module."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    names = NameMap(base)
    for live, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield names.module(live), module
