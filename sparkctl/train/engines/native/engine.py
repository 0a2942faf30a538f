"""The native engine behind the training loop's interface: loading, what runs on what, what a run is pinned to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparkctl.data.batches import Pack
from sparkctl.errors import SparkError, UsageError
from sparkctl.hardware.machine import this_machine
from sparkctl.hardware.measurements import Layers, ways_here
from sparkctl.manifest.schema import Lora, PlanTable
from sparkctl.train.engines import cpu
from sparkctl.train.engines.device import planned_device

if TYPE_CHECKING:
    import torch
    from sparkctl_kernels.dispatch import Choice
    from torch.nn import Parameter

    from sparkctl.train.engines.native.model import NativeModel


def load(
    plan: PlanTable, folder: Path, choices: dict[str, str], dtype: torch.dtype | None = None, *,
    allow_slow: bool = False, name: str = "RUN",
) -> NativeEngine:  # fmt: skip
    """The engine for `plan` on the model in `folder`. dtype: of the GEMMs; fp32 is for proofs. name: the run in hints.

    Raises UsageError for a model that only the reference computes, SparkError where a GPU would run a slow fallback.
    """
    import torch

    from sparkctl.model.load import load_text_model
    from sparkctl.model.names import NameMap

    device, dtype = planned_device(plan.machine.device, name), dtype or torch.bfloat16
    check_served(folder, device.type, f"sparkctl recommend {name} --engine reference")
    base = load_text_model(folder, dtype=dtype if plan.lora else torch.float32, device=device)
    return from_model(
        base, lora=plan.lora, checkpointing=plan.checkpointing, seed=plan.seed, dtype=dtype, names=NameMap(base),
        choices=choices, allow_slow=allow_slow,
    )  # fmt: skip


def from_model(
    base: Any, *, lora: Lora | None, checkpointing: bool, seed: int = 0, dtype: torch.dtype | None = None,
    names: Names | None = None, choices: dict[str, str] | None = None, allow_slow: bool = False,
) -> NativeEngine:  # fmt: skip
    """The engine on a text model of transformers, whose tensors it shares: bf16 for adapters, fp32 to be trained whole.

    names: what its parts are called in its checkpoint; without one they are called as they are.
    """
    import torch

    from sparkctl.train.engines.native.model import NativeModel

    parts = settle(base, Layers.of(base.config, lora.r if lora else 0), choices or {}, allow_slow)
    base.requires_grad_(lora is None)
    trained, adapters = trainable(base, lora, seed, names or AsTheyAre())
    model = NativeModel(
        base, adapters, lora.alpha / lora.r if lora else 1.0, trained=lora is None, checkpointing=checkpointing,
        dtype=dtype or torch.bfloat16,
    )  # fmt: skip
    return NativeEngine(model, trained, parts)


def settle(base: Any, layers: Layers, choices: dict[str, str], allow_slow: bool) -> list[Choice]:
    """Compute as an earlier start did, or as this device does best; what each operator of the model runs on.

    Raises SparkError where a GPU would run a slow fallback and `allow_slow` does not let it.
    """
    device = next(base.parameters()).device
    if device.type == "cpu":
        cpu.settle(base.config.hidden_size, choices)
    else:
        pin_start(choices, layers)
    parts = kernels(base, device)
    if not allow_slow:
        refuse_slow(parts)
    return parts


def pin_start(choices: dict[str, str], layers: Layers) -> None:
    """Compute as the earlier start whose choices these are; at a first start, without any, by the fastest products."""
    pin_kernels({**choices, **ways_of(choices, layers)})


def ways_of(choices: dict[str, str], layers: Layers) -> dict[str, str]:
    """The products that a GPU computes by other ways than torch's: as at the earlier start whose choices these are, at
    a first start, without any, as `bench products` found fastest here."""
    from sparkctl_kernels import ways

    return ways.among(choices or ways_here(this_machine(), layers))


class Names(Protocol):
    """What a live model's tensors and linear layers are called in its checkpoint, as `NameMap` knows."""

    def checkpoint(self, live: str) -> str: ...

    def module(self, live: str) -> str: ...


class AsTheyAre:
    """Names of a model that has no checkpoint."""

    def checkpoint(self, live: str) -> str:
        """Of a tensor."""
        return live

    def module(self, live: str) -> str:
        """Of a linear layer."""
        return live


def check_served(folder: Path, device: str, instead: str) -> None:
    """Raise UsageError unless the layers of this model are among those that are built here for that kind of device."""
    from sparkctl.model.inspect import inspect
    from sparkctl.model.served import lacking

    if what := lacking(inspect(folder, allow_unknown=True), device):
        raise UsageError(f"the native engine has nothing for {what}", instead)


def trainable(
    base: Any, lora: Lora | None, seed: int, names: Names
) -> tuple[dict[str, Parameter], dict[int, tuple[Parameter, Parameter]]]:
    """(masters by name, adapters by their linear layer's id), ordered and begun as in the reference engine.

    peft is not needed for them, whose import takes seconds.
    """
    import torch

    from sparkctl.model.families import DELTA, USUAL
    from sparkctl.model.lora import A, B, initial_a

    if lora is None:
        return {names.checkpoint(name): parameter for name, parameter in base.named_parameters()}, {}
    trained: dict[str, Parameter] = {}
    adapters: dict[int, tuple[Parameter, Parameter]] = {}
    for live, linear in base.named_modules():
        if live.rpartition(".")[2] in USUAL + DELTA:
            path, device = names.module(live), linear.weight.device
            a = torch.nn.Parameter(initial_a(path, lora.r, linear.in_features, seed).to(device))
            b = torch.nn.Parameter(torch.zeros(linear.out_features, lora.r, dtype=torch.float32, device=device))
            trained[path + A], trained[path + B] = adapters[id(linear)] = a, b
    return trained, adapters


def kernels(base: Any, device: torch.device) -> list[Choice]:
    """What each operator of this model runs on."""
    from sparkctl_kernels import (
        attention,
        causal_conv,
        gated_delta,
        gated_norm,
        linear_cross_entropy,
        lora_linear,
        qk_norm_rope,
        rms_norm,
        sigmoid_gate,
        silu_mul,
    )  # fmt: skip

    from sparkctl.hardware.shape import head_dim

    config = base.config
    found = [op.choice(device) for op in (rms_norm, lora_linear, silu_mul, qk_norm_rope)]
    found.append(attention.choice(device, head_dim(vars(config))))
    if config.model_type.startswith("qwen3_5"):
        found += [sigmoid_gate.choice(device), causal_conv.choice(device)]
        found += [gated_delta.choice(device, config.linear_key_head_dim), gated_norm.choice(device)]
    return [*found, linear_cross_entropy.choice(device)]


def refuse_slow(parts: list[Choice]) -> None:
    """Raise SparkError where a GPU would compute in plain torch what has a fast kernel, with what mends it."""
    for part in parts:
        if part.slow:
            raise SparkError(
                f"{part.operator} would run on its slow {part.kernel}: {part.reason}",
                f"`{part.mend}`, or take the slow one with `--allow-slow`",
            )


class NativeEngine:
    """`model` computes; `trained` are its masters by name; `parts` says what runs on what."""

    name = "native"

    def __init__(self, model: NativeModel, trained: dict[str, Parameter], parts: list[Choice]) -> None:
        self._model, self._trained, self._parts = model, trained, parts
        self.device: torch.device = model.device

    def parameters(self) -> dict[str, Parameter]:
        """Adapters or masters by name."""
        return self._trained

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """Loss of the pack, its gradient times `scale` added to each `.grad`."""
        if has_labels(pack):
            return self._model.loss_and_gradients(pack, scale)
        self._model.stale = True  # the other ranks' gradients move this one's masters too
        return self._nothing()

    def eval_sum(self, pack: Pack) -> torch.Tensor:
        """Loss of the pack."""
        return self._model.loss(pack) if has_labels(pack) else self._nothing()

    def describe(self) -> list[tuple[str, str]]:
        """Which operator runs on which kernel."""
        return [
            ("engine", "native: packed documents, every operator forward and backward by hand"),
            *((part.operator, f"{part.kernel} ({part.reason})") for part in self._parts),
            *describe_ways(),
            ("lm_head", "on label tokens"),
            ("checkpointing", "every layer" if self._model.checkpointing else "off"),
        ]

    def choices(self) -> dict[str, str]:
        """The device, the kernel of each operator, the tiles its tuner found, the products that are not torch's; on a
        CPU the threads, which decide how sums are split."""
        return pinned(self.device, self._parts)

    def pin(self, choices: dict[str, str]) -> None:
        """Take the tiles that the first rank's tuner found, and the products as it computes them."""
        pin_kernels(choices)

    def _nothing(self) -> torch.Tensor:
        import torch

        return torch.zeros((), dtype=torch.float32, device=self.device)


def describe_ways() -> list[tuple[str, str]]:
    """How many products are not torch's, for a person; nothing where all are."""
    from sparkctl_kernels import ways

    others = len(ways.pinned())
    return [("products", f"{others} shapes not by {ways.TORCH}, as measured here")] if others else []


def pinned(device: torch.device, parts: list[Choice]) -> dict[str, str]:
    """What decides the bits of a training whose operators run on `parts`."""
    import torch
    from sparkctl_kernels import ways
    from sparkctl_kernels.gated_delta import op as gated_delta

    found = {part.operator: part.kernel for part in parts}
    if device.type == "cpu":
        return {"device": os.uname().machine, "threads": str(torch.get_num_threads()), **found}
    return {"device": torch.cuda.get_device_name(device), **found, **gated_delta.tiles(), **ways.pinned()}


def pin_kernels(choices: dict[str, str]) -> None:
    """Take the tiles of the delta rule, and the products that are not torch's, among `choices` from now on."""
    from sparkctl_kernels import ways
    from sparkctl_kernels.gated_delta import op as gated_delta

    ways.pin(choices)
    gated_delta.pin(choices)


def has_labels(pack: Pack) -> bool:
    """Whether any token behind the first of its document is trained."""
    return any(document.trained[1:].any() for document in pack.documents)
