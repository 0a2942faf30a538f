"""transformers and peft as published, one document a row: the judge of losslessness and of leaks.

Precision: base bf16 (tensors published in F32 stay F32), adapters or masters fp32, forward under bf16 autocast, the
loss in fp32, gradients accumulated in fp32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.data.batches import Document
from sparkctl.manifest.schema import PlanTable
from sparkctl.train.engines import cpu
from sparkctl.train.engines.device import planned_device
from sparkctl.train.engines.rows import RowEngine, padded

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

# B rows · L tokens of the longest row · D hidden · N label tokens · V vocabulary

PLAIN_HEAD = {"qwen2", "qwen3", "qwen3_5", "qwen3_5_text", "llama", "mistral"}  # logits = lm_head(hidden), no more


def load(
    plan: PlanTable, folder: Path, choices: dict[str, str], dtype: torch.dtype | None = None, *,
    allow_slow: bool = True, plain: bool = False, name: str = "RUN",
) -> ReferenceEngine:  # fmt: skip
    """The engine for `plan` on the model in `folder`. dtype: of the GEMMs; fp32 is the truth for proofs. It is slow
    everywhere and says so; plain: GatedDeltaNet in plain torch, whatever kernels are installed. name: the run in hints.
    """
    import torch

    from sparkctl.model.inspect import inspect
    from sparkctl.model.load import load_text_model
    from sparkctl.model.lora import adapter_tensors, add_adapters
    from sparkctl.model.names import NameMap
    from sparkctl.model.plain import plain_layers

    device, dtype = planned_device(plan.machine.device, name), dtype or torch.bfloat16
    if plan.lora:
        base = load_text_model(folder, dtype=dtype, device=device)
        targets = inspect(folder, allow_unknown=True).targets
        model = add_adapters(base, plan.lora.r, plan.lora.alpha, plan.seed, targets, name)
        trained = adapter_tensors(model)
    else:
        base = model = load_text_model(folder, dtype=torch.float32, device=device)
        names = NameMap(base)
        trained = {names.checkpoint(name): parameter for name, parameter in base.named_parameters()}
    if plain:
        plain_layers(base)
    if device.type == "cpu":
        cpu.settle(base.config.hidden_size, choices)
    return ReferenceEngine(base, trained, plan, dtype)


class ReferenceEngine(RowEngine):
    """`model`: a transformers causal language model, with peft's adapters in it or whole; `trained`: its masters."""

    name = "reference"

    def __init__(self, model: Any, trained: dict[str, Parameter], plan: PlanTable, dtype: torch.dtype) -> None:
        import torch

        self._half = dtype == torch.bfloat16
        super().__init__(model, trained, plan.pack_length)
        self._checkpointing = plan.checkpointing
        self._plain_head = model.config.model_type in PLAIN_HEAD
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if plan.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def describe(self) -> list[tuple[str, str]]:
        """Which part runs on what."""
        head = "label tokens" if self._plain_head else "every token"
        return [
            ("engine", "reference: transformers and peft, one document a row"),
            ("attention", str(self._model.config._attn_implementation)),
            ("lm_head", f"on {head}"),
            ("checkpointing", "every layer" if self._checkpointing else "off"),
        ]

    def choices(self) -> dict[str, str]:
        """The thread count decides how sums are split on a CPU; a GPU has none to pin here."""
        import torch

        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else os.uname().machine
        return {"device": device, "threads": str(torch.get_num_threads())}

    def _loss(self, documents: list[Document]) -> torch.Tensor | None:
        """Sum of the cross-entropy over the label tokens of these rows; None where there is no label."""
        import torch
        import torch.nn.functional as F

        ids_BL, mask_BL, labels_BL = padded(documents)
        if not labels_BL.any():
            return None
        ids, mask = torch.from_numpy(ids_BL).to(self.device), torch.from_numpy(mask_BL).to(self.device)
        at = torch.from_numpy(labels_BL[:, 1:]).to(self.device)  # hidden state t predicts token t + 1
        labels_N = ids[:, 1:][at]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half):
            inputs = dict(input_ids=ids, attention_mask=None if mask_BL.all() else mask, use_cache=False)
            if self._plain_head:
                hidden_BLD = self._model.model(**inputs).last_hidden_state
                logits_NV = self._model.lm_head(hidden_BLD[:, :-1][at])
            else:
                logits_NV = self._model(**inputs).logits[:, :-1][at]
        return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
