"""The stacks that are compared: each builds a model of the workload's shape and gives one micro-step of it.

The rivals get the pack as one row, one long document to them: no work to keep documents apart, and more attention.
A rival's model is as its users set it up: bf16 weights, adapters fp32 under bf16 autocast where peft makes them so.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.bench.workload import Workload, checkpoint_folder, model_of
from sparkctl.errors import SparkError
from sparkctl.model.families import DELTA, USUAL
from sparkctl.model.plain import plain_layers
from sparkctl.train.engines.hopper import allow_on_hopper

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a token that is not trained, in transformers


@dataclass(frozen=True)
class Stack:
    """A built stack. step: forward and backward of one pack, gives its loss; head_rows: rows that lm_head works on.

    summed: label tokens whose losses `step` adds up; 1 where it gives their mean.
    """

    step: Callable[[], Any]
    trainable: int
    head_rows: int
    checkpointing: bool
    choices: dict[str, str]
    summed: int = 1


def stock(work: Workload, device: torch.device) -> Stack:
    """transformers and peft without fla, gradient checkpointing."""
    hide("fla", "causal_conv1d")
    return _transformers(work, device, checkpointing=True, fla=False)


def peft_fla(work: Workload, device: torch.device) -> Stack:
    """transformers and peft with fla's kernels, never without; checkpointing where the workload says so."""
    if not find_spec("fla"):
        raise SparkError("flash-linear-attention is not installed", "pip install flash-linear-attention")
    return _transformers(work, device, checkpointing=work.checkpointing)


def unsloth(work: Workload, device: torch.device) -> Stack:
    """Unsloth at its fastest: no checkpointing."""
    return _unsloth(work, device, False)


def unsloth_default(work: Workload, device: torch.device) -> Stack:
    """Unsloth as it comes: its own checkpointing with offload."""
    return _unsloth(work, device, True)


def native(work: Workload, device: torch.device) -> Stack:
    """This project's engine, documents kept apart."""
    from sparkctl.train.engines.native.engine import from_model

    engine = from_model(
        model_of(work, device, _base_dtype(work)), lora=work.lora, checkpointing=work.checkpointing, seed=work.seed
    )
    return _engine(work, engine, work.checkpointing)


STACKS: dict[str, Callable[[Workload, Any], Stack]] = {
    "stock": stock,
    "peft-fla": peft_fla,
    "unsloth": unsloth,
    "unsloth-default": unsloth_default,
    "native": native,
}


def hide(*packages: str) -> None:
    """Make packages count as not installed in this process: for a stack that does without them."""

    class Hidden:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name.split(".")[0] in packages:
                raise ModuleNotFoundError(f"`{name}` is hidden from this stack", name=name)

    assert not any(name in sys.modules for name in packages), "hidden before anything is imported"
    sys.meta_path.insert(0, Hidden())


def _base_dtype(work: Workload) -> torch.dtype:
    import torch

    return torch.bfloat16 if work.mode == "lora" else torch.float32


def _engine(work: Workload, engine: Any, checkpointing: bool) -> Stack:
    pack = work.pack()
    return Stack(
        step=lambda: engine.micro_step(pack, 1 / pack.labels),
        trainable=sum(p.numel() for p in engine.parameters().values()),
        head_rows=pack.labels,
        checkpointing=checkpointing,
        choices=dict(engine.describe()),
        summed=pack.labels,
    )


def _transformers(work: Workload, device: torch.device, *, checkpointing: bool, fla: bool = True) -> Stack:
    import torch

    model = model_of(work, device, torch.bfloat16)
    if device.type == "cpu":
        plain_layers(model)
    elif fla:
        allow_on_hopper(model.config)
    if work.mode == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=_targets(model))
        model = get_peft_model(model, config)
    else:
        model.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return _row(work, model.train(), device, checkpointing)


def _unsloth(work: Workload, device: torch.device, checkpointing: bool) -> Stack:
    from sparkctl.train.engines import unsloth as rival

    rival.language_model()  # its import wants to come before that of transformers
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_folder(work, Path(folder) / "model", device)
        model = rival.load_base(
            checkpoint, work.tokens, full=work.mode == "full", checkpointing=checkpointing, seed=work.seed
        )
    allow_on_hopper(model.config)
    if work.lora:
        targets = _targets(model)
        model = rival.add_adapters(model, work.rank, work.rank, targets, checkpointing=checkpointing, seed=work.seed)
    return _row(work, model.train(), device, checkpointing)


def _targets(model: Any) -> list[str]:
    """The projections that this model has."""
    return sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & set(USUAL + DELTA))


def _row(work: Workload, model: Any, device: torch.device, checkpointing: bool) -> Stack:
    """A model that takes ids and labels [1, T] and computes its own loss."""
    import numpy as np
    import torch

    pack = work.pack()
    ids = torch.from_numpy(np.concatenate([d.ids for d in pack.documents]).astype(np.int64)).to(device)[None]
    trained = torch.from_numpy(np.concatenate([d.trained for d in pack.documents])).to(device)[None]
    labels = torch.where(trained, ids, IGNORED)

    def step() -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        return loss

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Stack(step, trainable, work.tokens, checkpointing, {})
