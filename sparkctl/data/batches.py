"""Which packs an optimiser step sees: a function of (seed, epoch, step) alone, so that a resumed run repeats itself.

Each epoch packs every training document once, anew. An optimiser step takes `gradient_accumulation` packs in a row;
an epoch's last step takes what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparkctl.data.pack import Packs, best_fit
from sparkctl.data.tokens import TokenStore, label_count
from sparkctl.errors import SparkError


@dataclass(frozen=True)
class Document:
    """One conversation: its row in the store, ids int32 [L] and which of them are trained, bool [L]."""

    id: int
    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Pack:
    """Documents computed together that never see each other. `labels` counts predicted trained tokens."""

    documents: list[Document]
    tokens: int
    labels: int


class Schedule:
    """Every optimiser step of a run, by number. One epoch's packing is kept at a time."""

    def __init__(
        self,
        store: TokenStore,
        *,
        pack_length: int,
        gradient_accumulation: int,
        epochs: int,
        seed: int,
        max_steps: int | None = None,
    ) -> None:
        self._store = store
        self._rows = np.flatnonzero(~store.held_out)
        if not len(self._rows):
            raise SparkError("the token store has no training example", "give `analyze` more data")
        self._pack_length, self._accumulation, self._seed = pack_length, gradient_accumulation, seed
        self._packs: dict[int, Packs] = {}
        firsts = [0]  # the first step of each epoch
        while len(firsts) <= epochs and (max_steps is None or firsts[-1] < max_steps):
            firsts.append(firsts[-1] + -(-len(self._epoch(len(firsts) - 1)) // gradient_accumulation))
        self._firsts = np.array(firsts)
        self.steps = firsts[-1] if max_steps is None else min(max_steps, firsts[-1])

    def step(self, n: int) -> list[Pack]:
        """The packs of optimiser step `n` (from 0), those of all ranks."""
        return [make_pack(self._store, rows) for rows in self._rows_of(n)]

    def labels(self, n: int) -> int:
        """Label tokens of optimiser step `n` over all its packs: the loss of a token weighs one over this."""
        return int(sum(self._store.label_counts[rows].sum() for rows in self._rows_of(n)))

    def epoch(self, n: int) -> int:
        """The epoch (from 0) that step `n` belongs to."""
        return int(np.searchsorted(self._firsts, n, side="right")) - 1

    def around_longest(self) -> Pack:
        """The first epoch's pack that holds the longest training document."""
        packs = self._epoch(0)
        home = packs.home(int(np.argmax(self._store.lengths[self._rows])))
        return make_pack(self._store, self._rows[packs.pack(home)])

    def heaviest(self, chunk: int) -> list[Pack]:
        """The packs of which each may want the most memory, each once: of those that are trained in any epoch the one
        around the longest document, and where others have more of them, that of most tokens, of most labels, and of
        most chunks of `chunk` tokens, of which each document begins its own.
        """
        store, rows = self._store, self._rows
        lengths, labels = store.lengths[rows].astype(np.int64), store.label_counts[rows].astype(np.int64)
        summed = (lengths, labels, -(-lengths // chunk))
        most: list[tuple[int, np.ndarray]] = [(0, rows[:0])] * (1 + len(summed))
        for epoch in reversed(range(len(self._firsts) - 1)):  # the first stays at hand
            packs, trained = self._epoch(epoch), (self.steps - int(self._firsts[epoch])) * self._accumulation
            for i, weights in enumerate([packs.most(lengths), *map(packs.sums, summed)]):
                at = int(np.argmax(weights[:trained]))
                if weights[at] >= most[i][0]:  # of equal ones the earliest
                    most[i] = (int(weights[at]), packs.pack(at))
        chosen = [most[0][1]]
        for values, (total, pack) in zip(summed, most[1:], strict=True):
            if all(total > values[other].sum() for other in chosen):
                chosen.append(pack)
        return [make_pack(store, rows[pack]) for pack in chosen]

    def _rows_of(self, n: int) -> list[np.ndarray]:
        if not 0 <= n < self.steps:
            raise IndexError(f"step {n} of {self.steps}")
        epoch = self.epoch(n)
        packs = self._epoch(epoch)
        first = (n - int(self._firsts[epoch])) * self._accumulation
        return [self._rows[packs.pack(i)] for i in range(first, min(first + self._accumulation, len(packs)))]

    def _epoch(self, epoch: int) -> Packs:
        if epoch not in self._packs:
            packs = best_fit(self._store.lengths[self._rows], self._pack_length, seed=(self._seed, epoch))
            self._packs = {epoch: packs}
        return self._packs[epoch]


def share(packs: Sequence[Pack], rank: int, world_size: int) -> list[Pack]:
    """The packs of one rank: every rank gets as many, the missing ones as packs without documents.

    Packs are dealt from the most tokens to the fewest, to and fro, so that ranks finish together.
    """
    order = sorted(range(len(packs)), key=lambda i: (-packs[i].tokens, i))
    rounds = [order[i : i + world_size] for i in range(0, len(order), world_size)]
    mine: list[Pack] = []
    for number, dealt in enumerate(rounds):
        seat = rank if number % 2 == 0 else world_size - 1 - rank
        mine.append(packs[dealt[seat]] if seat < len(dealt) else Pack([], 0, 0))
    return mine


def eval_packs(store: TokenStore, pack_length: int) -> list[Pack]:
    """Packs of the held-out documents, the same at each call; longer ones where a document needs it."""
    rows = np.flatnonzero(store.held_out)
    if not len(rows):
        return []
    packs = best_fit(store.lengths[rows], max(pack_length, int(store.lengths[rows].max())), seed=0)
    return [make_pack(store, rows[packs.pack(i)]) for i in range(len(packs))]


def make_pack(store: TokenStore, rows: np.ndarray) -> Pack:
    """The pack of these rows of the store."""
    documents = [Document(int(row), *store.document(int(row))) for row in rows]
    return Pack(
        documents,
        tokens=sum(len(document.ids) for document in documents),
        labels=sum(label_count(document.trained) for document in documents),
    )
