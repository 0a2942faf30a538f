"""Unsloth's own model, patches and LoRA behind the training loop: an extra for those who trust it, the rival in bench.

What it shares with the other engines: packs, first adapters, fp32 masters, optimiser, checkpoints, names. What is its
own: everything that computes. Documents stand a row each, padded on the right without a mask, which a causal model's
real tokens never see. Its losses are means over label tokens, so they are multiplied by their count. It prints to
stdout, which belongs to a command's answer: that goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl import env
from sparkctl.data.batches import Document
from sparkctl.errors import SparkError, UsageError
from sparkctl.hardware.software import UNREADABLE, installed, requirements
from sparkctl.manifest.schema import PlanTable
from sparkctl.train.engines.hopper import allow_on_hopper
from sparkctl.train.engines.rows import RowEngine, padded

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

# B rows · L tokens of the longest row

INSTALL = "pip install 'dgx-sparkctl[unsloth]'"
PACKAGES = ("unsloth", "unsloth_zoo")
IGNORED = -100  # label of a token that is not trained, in transformers


def load(
    plan: PlanTable, folder: Path, choices: dict[str, str], *, allow_slow: bool = False, name: str = "RUN"
) -> UnslothEngine:
    """The engine for `plan` on the model in `folder`; it has nothing to pin and nothing slow to refuse.

    Raises UsageError where Unsloth or a GPU is not there, SparkError where it leaves out what the plan trains.
    """
    from sparkctl.model.inspect import inspect
    from sparkctl.model.load import restore_f32
    from sparkctl.model.lora import adapter_tensors, begin_adapters
    from sparkctl.model.names import NameMap
    from sparkctl.model.weights import Checkpoint

    language_model()  # its import wants to come before that of transformers
    require_gpu(plan, name)
    base = load_base(
        folder, plan.pack_length, full=plan.lora is None, checkpointing=plan.checkpointing, seed=plan.seed, fp32=True
    )
    allow_on_hopper(base.config)
    base.name_or_path = str(folder)  # where names and first values are read
    restore_f32(base, Checkpoint(folder), widened=True)  # Unsloth loads in bf16, then makes norms and masters fp32
    names = NameMap(base)
    tensors = {names.checkpoint(live): parameter for live, parameter in base.named_parameters()}
    if plan.lora is None:
        return UnslothEngine(base, masters(tensors), plan)
    targets = inspect(folder, allow_unknown=True).targets
    wanted = [live for live, _ in base.named_modules() if live.rpartition(".")[2] in targets]
    model = add_adapters(base, plan.lora.r, plan.lora.alpha, targets, checkpointing=plan.checkpointing, seed=plan.seed)
    trained = masters(adapter_tensors(model))
    begin_adapters(model, plan.seed)
    if len(trained) != 2 * len(wanted):
        raise SparkError(
            f"unsloth gives {len(trained) // 2} of the model's {len(wanted)} projections an adapter",
            f"sparkctl recommend {name} --engine native",
        )
    return UnslothEngine(model, trained, plan)


def require_gpu(plan: PlanTable, name: str) -> None:
    """Raise UsageError unless the plan is for a GPU that is there."""
    import torch

    if plan.machine.device != "cuda" or not torch.cuda.is_available():
        raise UsageError(
            "the unsloth engine needs a GPU that torch can use", f"sparkctl recommend {name} --engine native"
        )


def load_base(
    folder: Path, longest: int, *, full: bool, checkpointing: bool, seed: int, fp32: bool | None = None
) -> Any:
    """Unsloth's text model of `folder`. Raises UsageError, see `language_model`.

    longest: tokens of a row. fp32: what is trained is so; None leaves it to Unsloth, whose whole models are bf16 then.
    """
    import torch

    with to_stderr():
        model, _ = language_model().from_pretrained(
            str(folder), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=False, full_finetuning=full,
            float32_mixed_precision=fp32, use_gradient_checkpointing=own(checkpointing), use_exact_model_name=True,
            random_state=seed, text_only=True,
        )  # fmt: skip
    model.config.use_cache = False
    return model


def add_adapters(base: Any, r: int, alpha: int, targets: Sequence[str], *, checkpointing: bool, seed: int) -> Any:
    """Unsloth's peft model of `base`, adapters on every module whose last name is in `targets`."""
    with to_stderr():
        return language_model().get_peft_model(
            base, r=r, lora_alpha=alpha, lora_dropout=0, bias="none", target_modules=list(targets),
            use_gradient_checkpointing=own(checkpointing), random_state=seed,
        )  # fmt: skip


def own(checkpointing: bool) -> bool | str:
    """Unsloth's word for its own checkpointing, which offloads to the host, or False."""
    return "unsloth" if checkpointing else False


def language_model() -> Any:
    """unsloth.FastLanguageModel. Raises UsageError where it is missing, its pins do not fit, or it does not import."""
    why = misfit()
    if why:
        raise UsageError(why, INSTALL)
    env.settle_unsloth()
    try:
        with to_stderr():
            from unsloth import FastLanguageModel
    except Exception as error:  # its import checks the machine in its own ways
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"unsloth {installed('unsloth')} does not import: {said[0]}", INSTALL) from error
    return FastLanguageModel


def misfit() -> str | None:
    """What keeps Unsloth from running here by its own word: it is not installed, or asks for other versions."""
    from packaging.requirements import Requirement

    ours = installed(PACKAGES[0])
    if ours is None:
        return "unsloth is not installed"
    wrong: dict[str, str] = {}
    for package in PACKAGES:
        for wanted in map(Requirement, requirements(package)):
            if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
                continue
            here = installed(wanted.name)
            if here not in (None, UNREADABLE) and not wanted.specifier.contains(here, prereleases=True):
                wrong[wanted.name] = f"{wanted.name}{wanted.specifier}, here is {here}"
    return f"unsloth {ours} does not fit: it asks for {'; '.join(wrong.values())}" if wrong else None


def masters(trained: dict[str, Parameter]) -> dict[str, Parameter]:
    """The same parameters, trained, and in fp32 whatever Unsloth made them."""
    import torch

    for parameter in trained.values():
        parameter.requires_grad_(True)
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return trained


@contextmanager
def to_stderr() -> Iterator[None]:
    """What Unsloth prints in this block is no answer of a command."""
    with redirect_stdout(sys.stderr):
        yield


class UnslothEngine(RowEngine):
    """`model`: Unsloth's, with its adapters or whole; `trained`: the masters by name."""

    name = "unsloth"

    def __init__(self, model: Any, trained: dict[str, Parameter], plan: PlanTable) -> None:
        super().__init__(model, trained, plan.pack_length)
        self._checkpointing = plan.checkpointing

    def describe(self) -> list[tuple[str, str]]:
        """Which part runs on what."""
        return [
            ("engine", f"unsloth {installed('unsloth')}: its model and patches, one document a row"),
            ("lm_head", "on every token"),
            ("checkpointing", "unsloth's own, offloaded" if self._checkpointing else "off"),
        ]

    def choices(self) -> dict[str, str]:
        """Unsloth tunes and compiles at each start: there is nothing that could be pinned but the device."""
        import torch

        return {"device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"}

    def _loss(self, documents: list[Document]) -> torch.Tensor | None:
        """Sum of the cross-entropy over the label tokens of these rows; None where there is no label."""
        import torch

        ids_BL, _, trained_BL = padded(documents)
        count = int(trained_BL.sum())  # the first token of a row is none, so shifting loses no label
        if not count:
            return None
        ids = torch.from_numpy(ids_BL).to(self.device)
        labels = torch.where(torch.from_numpy(trained_BL).to(self.device), ids, IGNORED)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            mean = self._model(input_ids=ids, labels=labels, use_cache=False).loss
        return mean.float() * count

    def _around(self) -> AbstractContextManager[None]:
        return to_stderr()
