"""Where the documents of a pack begin and end, as kernels want it: made once a pack, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 64  # tokens the delta rule takes at once
QUERY_BLOCKS, KEY_BLOCKS = (32, 64, 128), (32, 64)  # sizes that attention kernels cut documents into


@dataclass(frozen=True)
class Documents:
    """Documents that follow each other in a pack of T tokens and never meet. Tensors are int32 on one device.

    lengths: their tokens, on the host. cu_seqlens: [documents + 1]. positions: [T], from 0 in each document.
    query_blocks, key_blocks: by block size [blocks, 3] of (first row, first row of its document, row behind its
    document), those with most work first, so that the last to run are short. chunks: [chunks, 2] of (document, chunk in
    it); chunk_offsets: [documents + 1], int64, as flash-linear-attention has them.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    query_blocks: dict[int, torch.Tensor]
    key_blocks: dict[int, torch.Tensor]
    chunks: torch.Tensor
    chunk_offsets: torch.Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)


def documents(lengths: Sequence[int], device: torch.device) -> Documents:
    """Documents of these lengths, each at least 1."""
    sizes = np.asarray(lengths, dtype=np.int32)
    ends = np.cumsum(sizes, dtype=np.int32)
    starts = ends - sizes
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(starts, sizes)
    offsets = np.concatenate([[0], np.cumsum(-(-sizes // CHUNK))]).astype(np.int64)
    arrays = [np.concatenate([[0], ends]), positions, np.stack(_cut(sizes, CHUNK), axis=1)]
    for size in QUERY_BLOCKS:
        arrays.append(_blocks(sizes, starts, ends, size, queries=True))
    for size in KEY_BLOCKS:
        arrays.append(_blocks(sizes, starts, ends, size, queries=False))
    cu_seqlens, places, chunks, chunk_offsets, *blocks = upload(
        [*arrays[:3], offsets.view(np.int32), *arrays[3:]], device
    )
    return Documents(
        tuple(int(n) for n in lengths), cu_seqlens, places,
        dict(zip(QUERY_BLOCKS, blocks, strict=False)), dict(zip(KEY_BLOCKS, blocks[len(QUERY_BLOCKS) :], strict=True)),
        chunks, chunk_offsets.view(torch.int64),
    )  # fmt: skip


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int32 arrays on `device`, moved at once from pinned memory: a GPU is not waited for. Each begins at 64 bytes."""
    places = np.cumsum([0, *(-(-array.size // 16) * 16 for array in arrays)]).tolist()
    host = torch.zeros(places[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, at in zip(arrays, places, strict=False):
        host[at : at + array.size] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32).reshape(-1))
    moved = host.to(device, non_blocking=True)
    return [moved[at : at + array.size].view(array.shape) for array, at in zip(arrays, places, strict=False)]


def _cut(sizes: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each block of `block` tokens: its document, and which of the document's blocks it is."""
    counts = -(-sizes // block)
    document = np.repeat(np.arange(len(sizes)), counts)
    return document, np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)


def _blocks(sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray, block: int, *, queries: bool) -> np.ndarray:
    """(first row, document's start, document's end) of every block; a query block's work is the keys before it, a key
    block's the queries behind it."""
    document, number = _cut(sizes, block)
    first, start, end = starts[document] + number * block, starts[document], ends[document]
    order = np.argsort(first - start if queries else end - first, kind="stable")[::-1]
    return np.stack([first, start, end], axis=1)[order]
