"""One document a row, padded on the right: what an engine that knows no packs makes of one.

A subclass says what a batch of rows loses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from sparkctl.data.batches import Document, Pack
from sparkctl.model.served import MOVING_ROPE

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

# B rows · L tokens of the longest row


class RowEngine(ABC):
    """`model`: a causal language model; `trained`: its masters by name; `area`: tokens of a batch, padding included."""

    def __init__(self, model: Any, trained: dict[str, Parameter], area: int) -> None:
        self._model, self._trained, self._area = model, trained, area
        self._moving = [module for module in model.modules() if getattr(module, "rope_type", None) in MOVING_ROPE]
        self.device: torch.device = next(model.parameters()).device

    def parameters(self) -> dict[str, Parameter]:
        """Adapters or masters by name."""
        return self._trained

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """Loss of the pack, its gradient times `scale` added to each `.grad`; a batch of rows at a time."""
        self._model.train()  # what turns gradient checkpointing on; no dropout is left in these models
        total = self._zero()
        with self._around():
            for documents in self._batches(pack):
                loss = self._loss(documents)
                if loss is not None:
                    (loss * scale).backward()
                    total += loss.detach()
        return total

    def eval_sum(self, pack: Pack) -> torch.Tensor:
        """Loss of the pack."""
        import torch

        self._model.eval()
        total = self._zero()
        with torch.no_grad(), self._around():
            for documents in self._batches(pack):
                loss = self._loss(documents)
                if loss is not None:
                    total += loss
        return total

    def pin(self, choices: dict[str, str]) -> None:  # noqa: B027 (there is nothing to do)
        """A library cannot be told what to tune to."""

    @abstractmethod
    def _loss(self, documents: list[Document]) -> torch.Tensor | None:
        """Sum of the cross-entropy over the label tokens of these rows; None where there is no label."""

    def _batches(self, pack: Pack) -> Iterator[list[Document]]:
        """Rows of like length together; each alone where the longest of them turns the others' rotations too."""
        for documents in batches(pack, 1 if self._moving else self._area, powers=self.device.type == "cuda"):
            for rotations in self._moving:
                as_loaded(rotations)
            yield documents

    def _around(self) -> AbstractContextManager[None]:
        """What the model is called within."""
        return nullcontext()

    def _zero(self) -> torch.Tensor:
        import torch

        return torch.zeros((), dtype=torch.float32, device=self.device)


def as_loaded(rotations: Any) -> None:
    """Let a rotary embedding forget the longest row that it met: transformers' dynamic one keeps its frequencies."""
    if hasattr(rotations, "max_seq_len_cached"):
        rotations.max_seq_len_cached = rotations.original_max_seq_len
        rotations.inv_freq = rotations.original_inv_freq.to(rotations.inv_freq.device)


def batches(pack: Pack, area: int, *, powers: bool) -> Iterator[list[Document]]:
    """The pack's documents from the longest to the shortest, as many at once as fill `area` with padding.

    powers: as many of them as a power of two. On a GPU flash-linear-attention compiles and tunes two of its kernels for
    every count of rows that it has not met, which takes seconds, and real packs bring dozens of counts.
    """
    documents = sorted(pack.documents, key=lambda document: (-len(document.ids), document.id))
    while documents:
        count = min(len(documents), max(1, area // len(documents[0].ids)))
        if powers:
            count = 1 << (count.bit_length() - 1)
        yield documents[:count]
        documents = documents[count:]


def padded(documents: list[Document]) -> tuple[Any, Any, Any]:
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
