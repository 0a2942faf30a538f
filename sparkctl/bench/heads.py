"""The stacks of `bench mtp`: a frozen model of the workload's shape, and one micro-step of its MTP head's training.

All begin with the same random head. What the rival does is in head_rival.py; it computes each chunk of its loss twice,
so that autograd keeps no logits, or (`transformers-direct`) runs a chunk's backward at once, as this project does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparkctl.bench.stacks import STACKS, Stack
from sparkctl.bench.workload import Workload, model_of
from sparkctl.manifest.schema import HeadPlan

if TYPE_CHECKING:
    import torch

Build = Callable[[Workload, Any], Stack]
DECAY: float = HeadPlan.model_fields["decay"].default


def native(work: Workload, device: torch.device) -> Stack:
    """This project's engine."""
    import torch

    from sparkctl.mtp.drafter import Drafter
    from sparkctl.mtp.engine import HeadEngine

    drafter = Drafter.of(model_of(work, device, torch.bfloat16).eval(), work.text)
    drafter.head.begin_anew(work.seed)
    engine, pack = HeadEngine(drafter, steps=work.draft_steps, decay=DECAY, loss="kl"), work.pack()
    trainable = sum(parameter.numel() for parameter in engine.parameters().values())
    choices = dict(engine.describe())
    return Stack(lambda: engine.micro_step(pack, 1 / pack.labels), trainable, pack.labels, False, choices, pack.labels)


def transformers(work: Workload, device: torch.device) -> Stack:
    """transformers, with fla where it is installed; each chunk of the loss under a checkpoint."""
    return _rival(work, device, checkpointing=True)


def transformers_direct(work: Workload, device: torch.device) -> Stack:
    """The same; each chunk's backward at once, which makes no logits twice."""
    return _rival(work, device, checkpointing=False)


HEAD_STACKS: dict[str, Build] = {
    "transformers": transformers,
    "transformers-direct": transformers_direct,
    "native": native,
}


def stacks_of(work: Workload) -> Mapping[str, Build]:
    """The stacks that can do this work, by name."""
    return HEAD_STACKS if work.draft_steps else STACKS


def _rival(work: Workload, device: torch.device, *, checkpointing: bool) -> Stack:
    from sparkctl.bench.head_rival import Rival
    from sparkctl.mtp.engine import step_weights
    from sparkctl.mtp.head import Head

    ours = Head(work.text, device)
    ours.begin_anew(work.seed)
    tensors = {name: parameter.detach() for name, parameter in ours.published().items()}
    rival = Rival(work, device, tensors, step_weights(work.draft_steps, DECAY), checkpointing=checkpointing)
    trainable = sum(parameter.numel() for parameter in rival.head.parameters())
    return Stack(rival.step, trainable, sum(work.labels), checkpointing, {}, sum(work.labels))
