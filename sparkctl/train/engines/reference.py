"""transformers and peft as published, one document a row: the judge of losslessness and of leaks.

Precision: base bf16 (tensors published in F32 stay F32), adapters or masters fp32, forward under bf16 autocast, the
loss in fp32, gradients accumulated in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.data.batches import Document, Pack
from sparkctl.errors import UsageError
from sparkctl.manifest.schema import PlanTable
from sparkctl.train.engines import cpu

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

    if plan.machine.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "the plan is for a GPU, and torch finds none", f"plan for this machine: `sparkctl recommend {name}`"
        )
    device, dtype = torch.device(plan.machine.device), dtype or torch.bfloat16
    if plan.lora:
        base = load_text_model(folder, dtype=dtype, device=device)
        targets = inspect(folder, allow_unknown=True).targets
        model = add_adapters(base, plan.lora.r, plan.lora.alpha, plan.seed, targets)
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


class ReferenceEngine:
    """`model`: a transformers causal language model, with peft's adapters in it or whole; `trained`: its masters."""

    name = "reference"

    def __init__(self, model: Any, trained: dict[str, Parameter], plan: PlanTable, dtype: torch.dtype) -> None:
        import torch

        self._half = dtype == torch.bfloat16
        self._model, self._trained, self._area = model, trained, plan.pack_length
        self._checkpointing = plan.checkpointing
        self.device: torch.device = next(model.parameters()).device
        self._plain_head = model.config.model_type in PLAIN_HEAD
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if plan.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def parameters(self) -> dict[str, Parameter]:
        """Adapters or masters by name."""
        return self._trained

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """Loss of the pack, its gradient times `scale` added to each `.grad`; a batch of rows at a time."""
        import torch

        self._model.train()  # what turns gradient checkpointing on; no dropout is left in these models
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for documents in batches(pack, self._area):
            loss = self._loss(documents)
            if loss is not None:
                (loss * scale).backward()
                total += loss.detach()
        return total

    def eval_sum(self, pack: Pack) -> torch.Tensor:
        """Loss of the pack."""
        import torch

        self._model.eval()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        with torch.no_grad():
            for documents in batches(pack, self._area):
                loss = self._loss(documents)
                if loss is not None:
                    total += loss
        return total

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

        ids_BL, mask_BL, labels_BL = rows(documents)
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


def batches(pack: Pack, area: int) -> Iterator[list[Document]]:
    """The pack's documents from the longest to the shortest, as many at once as fill `area` with padding."""
    documents = sorted(pack.documents, key=lambda document: (-len(document.ids), document.id))
    while documents:
        count = max(1, area // len(documents[0].ids))
        yield documents[:count]
        documents = documents[count:]


def rows(documents: list[Document]) -> tuple[Any, Any, Any]:
    """(ids int64 [B, L], mask int64 [B, L], trained bool [B, L]), padded on the right with zeros.

    Position 0 of a document is never trained: nothing stands before it.
    """
    import numpy as np

    longest = max(len(document.ids) for document in documents)
    ids = np.zeros((len(documents), longest), dtype=np.int64)
    mask, trained = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length], mask[row, :length], trained[row, :length] = document.ids, 1, document.trained
    trained[:, 0] = False
    return ids, mask, trained
