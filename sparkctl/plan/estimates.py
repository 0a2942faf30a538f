"""What a plan costs: memory, time and disk, from the lengths in the token store and the models in `hardware`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sparkctl.data.pack import best_fit
from sparkctl.hardware.shape import CHUNK, Shape
from sparkctl.manifest.table import Mode

if TYPE_CHECKING:
    from sparkctl.data.tokens import TokenStore

MOMENTS = 3 * 4  # bytes a trained parameter of a checkpoint: master and two moments in fp32
DISK_RATE = 150e6  # bytes a second written, synced and hashed: a slow SSD
START_SECONDS = 15.0  # imports, a rehearsal's packs
LOAD_RATE = 500e6  # bytes of weights a second
TO_COME = 1.05  # of what the first epoch's packs have at most: those to come are packed anew
SAMPLE = 64  # packs that the padding is counted on
EVAL_SHARE = 0.5  # of a training pass that a pass without gradients takes, a third at best


@dataclass(frozen=True, eq=False)
class Documents:
    """Lengths and label tokens of what is trained and of what is held out: int32 [N]."""

    lengths: np.ndarray
    labels: np.ndarray
    held_out_lengths: np.ndarray

    @classmethod
    def of(cls, store: TokenStore) -> Documents:
        """Those of a token store."""
        out = store.held_out
        return cls(store.lengths[~out], store.label_counts[~out], store.lengths[out])

    @cached_property
    def longest(self) -> int:
        """The longest document, held out or not."""
        return int(max(self.lengths.max(initial=1), self.held_out_lengths.max(initial=1)))

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return int(self.lengths.sum())

    @property
    def held_out_tokens(self) -> int:
        """Tokens of an evaluation."""
        return int(self.held_out_lengths.sum())

    @property
    def label_share(self) -> float:
        """Label tokens among all."""
        return float(self.labels.sum()) / max(1, self.tokens)

    def up_to(self, tokens: int) -> Documents:
        """Those that are trained and no longer than so many tokens."""
        fitting = self.lengths <= tokens
        return Documents(self.lengths[fitting], self.labels[fitting], self.held_out_lengths)

    def most_labels(self, pack_length: int, seed: int) -> int:
        """Label tokens of the first epoch's fullest pack, and 5 % for packs to come."""
        return min(pack_length, int(TO_COME * _most(self, pack_length, seed)[0]))

    def most_chunks(self, pack_length: int, seed: int) -> int:
        """Likewise the chunks of the delta rule: those of one long document, and what short ones, each of which begins
        its own, have beyond them.
        """
        least = -(-pack_length // CHUNK)
        return least + int(TO_COME * max(0, _most(self, pack_length, seed)[1] - least))

    def padding(self, pack_length: int, seed: int) -> float:
        """Tokens computed for each real one where documents stand a row each, as the reference engine has them."""
        packs = best_fit(self.lengths, pack_length, seed=(seed, 0))
        tokens = area = 0
        for i in range(min(len(packs), SAMPLE)):
            rows = np.sort(self.lengths[packs.pack(i)])[::-1]
            tokens += int(rows.sum())
            while len(rows):
                count = max(1, pack_length // int(rows[0]))
                area += int(rows[0]) * len(rows[:count])
                rows = rows[count:]
        return area / tokens


@lru_cache(maxsize=64)
def _most(documents: Documents, pack_length: int, seed: int) -> tuple[int, int]:
    """(label tokens, chunks) of the first epoch's packs that have most of them."""
    if not len(documents.lengths):
        return 0, 0
    packs = best_fit(documents.lengths, pack_length, seed=(seed, 0))
    return int(packs.sums(documents.labels).max()), int(packs.sums(-(-documents.lengths // CHUNK)).max())


@dataclass(frozen=True)
class Model:
    """The model's numbers: its shape, the parameters that each mode trains, bytes of its checkpoint.

    lacking: what the native engine has nothing for in it, where there is such a thing. drafts: it has an MTP head.
    """

    shape: Shape
    full: int
    adapters_by_rank: int  # LoRA parameters with r = 1: they are linear in r
    bytes: int
    lacking: str | None = None
    drafts: bool = False

    def trainable(self, mode: Mode, r: int) -> int:
        """Parameters with gradients."""
        return self.full if mode == "full" else self.adapters_by_rank * r


def evaluation_seconds(documents: Documents, tokens_per_second: float) -> float:
    """One pass over the held-out documents."""
    return EVAL_SHARE * documents.held_out_tokens / tokens_per_second


def checkpoint_bytes(trainable: int) -> int:
    """A checkpoint on disk."""
    return MOMENTS * trainable


def save_seconds(trainable: int) -> float:
    """Writing, syncing and hashing a checkpoint."""
    return checkpoint_bytes(trainable) / DISK_RATE


def start_seconds(save: float, weights: int = 0) -> float:
    """Loading so many bytes of weights, and the rehearsal, which saves once."""
    return START_SECONDS + weights / LOAD_RATE + save


def loop_seconds(*, steps: int, step: float, save_every: int, evaluation: float, save: float) -> float:
    """All steps, the evaluation at the start, and one with each checkpoint: what [train] counts as its seconds."""
    saves = -(-steps // save_every)
    return steps * step + (1 + saves) * evaluation + saves * save


def disk_bytes(*, store: int, trainable: int, merged: int, keep: int, saves: int) -> tuple[int, int]:
    """(all, still to be written): the store, the merged model, and the checkpoints.

    Those kept and the best; the newest is whole before the oldest goes.
    """
    ahead = checkpoint_bytes(trainable) * min(keep + 2, saves) + merged
    return store + ahead, ahead
