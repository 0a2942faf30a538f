"""The model on lean layers: made from the loaded transformers model, run forward and backward over one pack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sparkctl_kernels.dispatch import deterministic
from sparkctl_kernels.documents import documents, upload
from sparkctl_kernels.linear_cross_entropy import op as linear_cross_entropy
from sparkctl_kernels.lora_linear.layer import add_gradient
from torch import nn

from sparkctl.data.batches import Pack
from sparkctl.train.engines.native.layers import Half, Kept, Norm, Place, halves
from sparkctl.train.engines.native.projections import Projections

# T tokens · D hidden · N label tokens · V vocabulary

Layer = tuple[Half, Half]


class Inputs(NamedTuple):
    """A pack on the device: ids [T], rows [N] whose next token is trained, those tokens [N]; int64."""

    ids: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    place: Place


class NativeModel:
    """Computes a pack's loss and gradients. `model` is transformers' text model, whose tensors are shared.

    adapters: see `Projections`. trained: full fine-tuning, every parameter an fp32 master. dtype: that of the GEMMs.
    The residual stream has the embedding's dtype: bf16 under adapters, fp32 where masters are trained, as in the
    reference.
    """

    def __init__(
        self, model: Any, adapters: Mapping[int, tuple[nn.Parameter, nn.Parameter]], scale: float, *,
        trained: bool, checkpointing: bool, dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        text = model.model
        self.dtype, self.checkpointing = dtype, checkpointing
        self.projections = Projections(adapters, scale, trained, dtype)
        offset = 1.0 if model.config.model_type.startswith("qwen3_5") else 0.0
        self.layers: list[Layer] = [halves(layer, self.projections, offset) for layer in text.layers]
        self.final = Norm(text.norm, offset)
        self.embedding: nn.Parameter = text.embed_tokens.weight
        self.padding: int | None = text.embed_tokens.padding_idx
        self.master: nn.Parameter = model.lm_head.weight
        self.head = self.projections.copied(self.master) if self.master.dtype != dtype else self.master.detach()
        self.rotary = text.rotary_emb
        self.stale = True  # an optimiser may have written to the masters since their copies were made
        self.device = self.embedding.device

    @torch.inference_mode()
    def loss(self, pack: Pack) -> torch.Tensor:
        """Σ of the label tokens' losses, fp32."""
        inputs = self.inputs(pack)
        last, residual = self._through(inputs)
        hidden, _ = self._final(last, residual, inputs)
        return linear_cross_entropy.forward(hidden, self.head, inputs.labels, 1.0)

    @torch.no_grad()
    def hidden(self, pack: Pack) -> torch.Tensor:
        """The states of all tokens after the final norm: [T, D] in the compute dtype."""
        last, residual = self._through(self.inputs(pack))
        out = torch.empty_like(last, dtype=self.dtype)
        self.final.forward(last, residual, out)
        return out

    def _through(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(last, residual) behind the last layer; nothing is kept for a backward."""
        self._refresh()
        last, residual = self._embedded(inputs), None
        for layer in self.layers:
            for half in layer:
                last, residual, _ = half.forward(last, residual, inputs.place)
        return last, residual

    @torch.no_grad()
    def loss_and_gradients(self, pack: Pack, scale: float) -> torch.Tensor:
        """The same; adds scale times its gradient to the fp32 `.grad` of everything trained."""
        if not self.projections.accumulating:
            self._refresh()
        self.stale = True
        inputs = self.inputs(pack)
        last, residual = self._embedded(inputs), None
        kept: list[list[Kept] | torch.Tensor] = []
        for layer in self.layers:
            last, residual, keeps = self._layer(layer, last, residual, inputs.place)
            kept.append(keeps[0].s_TD if self.checkpointing else keeps)
            del keeps  # where only the layer's input is kept
        hidden, rows = self._final(last, residual, inputs)
        del last, residual
        loss, d_rows = self._head(hidden, rows, inputs, scale)
        d = torch.zeros(len(inputs.ids), d_rows.shape[1], dtype=d_rows.dtype, device=self.device)
        d.index_copy_(0, inputs.rows, d_rows)
        low = d if d.dtype == self.dtype else d.to(self.dtype)
        for layer in reversed(self.layers):
            held = kept.pop()
            keeps = self._layer(layer, held, None, inputs.place)[2] if isinstance(held, torch.Tensor) else held
            del held
            for half in reversed(layer):
                bottom = half is self.layers[0][0] and not self.embedding.requires_grad
                low = half.backward(d, low, keeps.pop(), inputs.place, bottom)
        if self.embedding.requires_grad:
            self._embedding_gradient(inputs.ids, d)
        self.projections.leave()
        return loss

    def _refresh(self) -> None:
        self.projections.refresh(self.stale)
        self.stale = False

    def inputs(self, pack: Pack) -> Inputs:
        """The pack on the device, its boundaries, positions and rotations."""
        packed = documents([len(document.ids) for document in pack.documents], self.device)
        ids, rows, labels = (x.long() for x in upload([pack_ids(pack), *label_rows(pack)], self.device))
        return Inputs(ids, rows, labels, Place(packed, *self.rotation(packed.positions)))

    def rotation(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary embedding at these positions, fp32 [T, R/2]; R dims of a head are rotated."""
        at = positions_T[None]
        if hasattr(self.rotary, "mrope_section"):
            at = at[None].expand(3, -1, -1)
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=self.device), at)
        half = cos.shape[-1] // 2
        cos, sin = (x[0, :, :half].float().contiguous() for x in (cos, sin))
        return cos, sin

    def _embedded(self, inputs: Inputs) -> torch.Tensor:
        return F.embedding(inputs.ids, self.embedding)

    def _layer(
        self, layer: Layer, last: torch.Tensor, residual: torch.Tensor | None, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Kept]]:
        keeps = []
        for half in layer:
            last, residual, keep = half.forward(last, residual, place)
            keeps.append(keep)
        return last, residual, keeps

    def _final(
        self, last: torch.Tensor, residual: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the last norm of the rows that predict a label, those rows of the residual stream)."""
        last, residual = last[inputs.rows], residual[inputs.rows] if residual is not None else None
        hidden = last.new_empty(last.shape, dtype=self.dtype)
        return hidden, self.final.forward(last, residual, hidden)

    def _head(
        self, hidden_ND: torch.Tensor, rows_ND: torch.Tensor, inputs: Inputs, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient of the label rows of the residual stream); the head's and the last norm's go home."""
        dhidden, dhead, add = torch.empty_like(hidden_ND), None, self.master.grad is not None
        if self.master.requires_grad:
            if not add:
                self.master.grad = torch.empty_like(self.master)
            dhead = self.master.grad
        loss = linear_cross_entropy.forward(
            hidden_ND, self.head, inputs.labels, scale, dhidden_ND=dhidden, dweight_VD=dhead, add=add
        )
        d_rows = torch.empty_like(rows_ND)
        self.final.backward(dhidden, rows_ND, d_rows, add=False)
        return loss, d_rows

    def _embedding_gradient(self, ids: torch.Tensor, d_TD: torch.Tensor) -> None:
        """Add each token's row; where the head is tied its gradient is there already. Changes d.

        Rows of the padding token add nothing, wherever it stands in a document: torch's embedding leaves them out.
        """
        if self.padding is not None:
            d_TD.masked_fill_((ids == self.padding)[:, None], 0)
        if self.embedding.grad is None:
            add_gradient(self.embedding, torch.zeros_like(self.embedding))
        assert self.embedding.grad is not None
        with deterministic():
            self.embedding.grad.index_put_((ids,), d_TD.float(), accumulate=True)


def pack_ids(pack: Pack) -> np.ndarray:
    """Token ids of a pack's documents, one after the other: int32 [T]."""
    return np.concatenate([document.ids for document in pack.documents])


def label_rows(pack: Pack) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose next token is trained, those tokens): int32 [N] each. A document's first token is never a label."""
    rows, labels, start = [], [], 0
    for document in pack.documents:
        at = np.flatnonzero(document.trained[1:])
        rows.append(start + at)
        labels.append(document.ids[1:][at])
        start += len(document.ids)
    return np.concatenate(rows), np.concatenate(labels)
