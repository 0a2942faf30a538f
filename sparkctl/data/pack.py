"""Whole documents into packs of a fixed capacity: best fit, the longest first, around one random document a pack.

The hot loop never sees a document. Documents of one length are interchangeable and so are packs with equal room, so
one turn of the loop moves a whole group: "the 900 packs with exactly 212 tokens of room take the next 900 documents
of 212". A million documents have a few thousand distinct lengths: 0.2 s where a loop over documents takes minutes.

Best fit alone would put the same documents together in every epoch wherever lengths are distinct. So as many packs
as the tokens need at least are opened first: one for each document longer than half a pack, since no two of those can
share one, the others each with a document drawn by the seed; the rest is fitted around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparkctl.errors import SparkError


@dataclass(frozen=True)
class Packs:
    """Document ids of every pack, one after another: pack p holds order[starts[p] : starts[p + 1]]."""

    order: np.ndarray  # int64 [N]
    starts: np.ndarray  # int64 [P + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, i: int) -> np.ndarray:
        """Document ids of pack `i`."""
        return self.order[self.starts[i] : self.starts[i + 1]]


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int | tuple[int, ...]) -> Packs:
    """Packs of at most `capacity` tokens that hold each document once; which and in what order, `seed` says.

    Raises SparkError where documents are longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    too_long = int(np.count_nonzero(lengths > capacity))
    if too_long:
        raise SparkError(
            f"{too_long} of {len(lengths)} documents are longer than a pack of {capacity} tokens; "
            f"the longest has {int(lengths.max())}",
            f"use a pack length of at least {int(lengths.max())}",
        )
    # RandomState's stream is frozen (NEP 19): the same packs with any numpy
    random = np.random.RandomState(np.atleast_1d(seed))
    shuffled = random.permutation(len(lengths))
    shuffled = shuffled[np.argsort(2 * lengths[shuffled] <= capacity, kind="stable")]  # the longer half first
    first = max(int(np.count_nonzero(2 * lengths > capacity)), -(-int(lengths.sum()) // capacity))
    opened, rest = _by_length(shuffled[:first], lengths), _by_length(shuffled[first:], lengths)
    bins = _Bins(capacity)
    homes = bins.open_with(lengths[opened]) + bins.fit(lengths[rest])
    return _collect(np.concatenate([opened, rest]), np.array(homes, dtype=np.int64), bins.count, random)


def _by_length(documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The documents, longest first; those of equal length stay in the order given."""
    return documents[np.argsort(-lengths[documents], kind="stable")]


def _collect(documents: np.ndarray, homes: np.ndarray, count: int, random: np.random.RandomState) -> Packs:
    """Documents and the bin of each as Packs, the packs shuffled and the documents in each too."""
    place = random.permutation(count)[homes]
    mixed = random.permutation(len(documents))
    order = mixed[np.argsort(place[mixed], kind="stable")]
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=count), out=starts[1:])
    return Packs(documents[order], starts)


class _Bins:
    """Bins by the room left in them. Bit r of `_rooms` says that some bin has room r: the best fit is one shift."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rooms = 0
        self._by_room: dict[int, list[int]] = {}

    def open_with(self, lengths: np.ndarray) -> list[int]:
        """A new bin for each document, given longest first; returns the bins, in the documents' order."""
        homes: list[int] = []
        for length, documents in _runs(lengths):
            opened = self._open(documents)
            self._put(self.capacity - length, opened.copy())
            homes += opened
        return homes

    def fit(self, lengths: np.ndarray) -> list[int]:
        """Best fit for each document, given longest first; returns their bins, in the documents' order."""
        homes: list[int] = []
        for length, documents in _runs(lengths):
            while documents:
                room = self._tightest(length)
                each = min(room // length, documents)  # equal documents that the tightest bin takes in a row
                wanted = max(1, documents // each)
                bins = self._open(wanted) if room == self.capacity else self._take(room, wanted)
                homes += bins * each
                documents -= len(bins) * each
                self._put(room - each * length, bins)
        return homes

    def _tightest(self, length: int) -> int:
        fitting = self._rooms >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity

    def _open(self, count: int) -> list[int]:
        self.count += count
        return list(range(self.count - count, self.count))

    def _take(self, room: int, most: int) -> list[int]:
        bins = self._by_room[room]
        if most >= len(bins):
            del self._by_room[room]
            self._rooms ^= 1 << room
            return bins
        taken = bins[-most:]
        del bins[-most:]
        return taken

    def _put(self, room: int, bins: list[int]) -> None:
        if room in self._by_room:
            self._by_room[room] += bins
        elif room:
            self._by_room[room] = bins
            self._rooms |= 1 << room


def _runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Distinct lengths with their counts, longest first."""
    values, counts = np.unique(lengths, return_counts=True)
    return list(zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True))
