"""Whole documents into packs of a fixed capacity: best fit, the longest first, around documents drawn by the seed.

The hot loops never see a document. Documents of one length are interchangeable and so are packs with equal room, so
one turn of a loop moves a whole group: "the 900 packs with exactly 212 tokens of room take the next 900 documents of
212". A million documents have a few thousand distinct lengths: 0.3 s where a loop over documents takes minutes.

1. As many packs as the tokens need at least are begun with documents in random order. Best fit alone would put the
   same documents together in every epoch wherever lengths are distinct.
2. Where all documents are short, packs are completed exactly, by one document as long as the room or by two. Best fit
   alone leaves rooms that the shortest document is too long for: 100 to 299 tokens fill packs of 4,096 to 99.4 %, and
   to 99.9 % where completed first; 512 to 1,023 tokens to 95.5 and 99.1 %.
3. The rest goes by best fit, longest first.
"""

from __future__ import annotations

from collections import defaultdict
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

    def home(self, document: int) -> int:
        """The pack that holds a document."""
        return int(np.searchsorted(self.starts, np.flatnonzero(self.order == document)[0], side="right")) - 1

    def most(self, values: np.ndarray) -> np.ndarray:
        """The largest number of a document in each pack, int64 [P]."""
        return np.maximum.reduceat(values[self.order].astype(np.int64), self.starts[:-1])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """What a number of each document comes to in each pack, int64 [P]."""
        return np.add.reduceat(values[self.order].astype(np.int64), self.starts[:-1])


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int | tuple[int, ...]) -> Packs:
    """Packs of at most `capacity` tokens that hold each document once; which and in what order, `seed` says.

    Raises SparkError where documents are longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise SparkError(
            f"{np.count_nonzero(lengths > capacity)} of {len(lengths)} documents are longer than a pack of "
            f"{capacity} tokens; the longest has {longest}",
            f"use a pack length of at least {longest}",
        )
    if not len(lengths):
        return Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    # RandomState's stream is frozen (NEP 19): the same packs with any numpy
    random = np.random.RandomState(np.atleast_1d(seed))
    documents = random.permutation(len(lengths))
    short = 4 * longest <= capacity
    if not short:  # documents over half a pack, which no two share, begin the first packs
        documents = documents[np.argsort(2 * lengths[documents] <= capacity, kind="stable")]
    begun = _deal(lengths[documents], capacity) if short else _one_each(lengths[documents], capacity)
    rest = documents[len(begun) :]
    rest = rest[np.argsort(-lengths[rest], kind="stable")]
    bins = _Bins(capacity, begun, lengths[documents[: len(begun)]], np.bincount(lengths[rest], minlength=longest + 1))
    if short and np.percentile(lengths, 1) > capacity / 250:  # shorter ones fill every gap by themselves
        bins.complete()
    bins.fit()
    homes = np.concatenate([begun, bins.homes()])
    return _collect(np.concatenate([documents[: len(begun)], rest]), homes, bins.count, random)


def _one_each(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """A bin for each of the first documents: all longer than half a bin, and as many as are needed at least."""
    return np.arange(max(int(np.count_nonzero(2 * lengths > capacity)), -(-int(lengths.sum()) // capacity)))


def _deal(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bins for the first documents, in runs that leave room in each for a few chosen ones."""
    quota = capacity - int(lengths.max()) - int(lengths.mean())  # a run exceeds it by less than one document
    starts = np.cumsum(lengths) - lengths
    return starts[: np.searchsorted(starts, quota * -(-int(lengths.sum()) // capacity))] // quota


def _collect(documents: np.ndarray, homes: np.ndarray, count: int, random: np.random.RandomState) -> Packs:
    """Documents and the bin of each as Packs, the packs shuffled and the documents in each too."""
    place = random.permutation(count)[homes]
    mixed = random.permutation(len(documents))
    order = mixed[np.argsort(place[mixed], kind="stable")]
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=count), out=starts[1:])
    return Packs(documents[order], starts)


class _Bins:
    """Bins by the room left in them, and the stock of documents by length: how many are still to be placed.

    Bit r of `_rooms` says that some bin has room r: the tightest fit is one shift away.
    """

    def __init__(self, capacity: int, begun: np.ndarray, lengths: np.ndarray, stock: np.ndarray) -> None:
        self.capacity = capacity
        self.count = int(begun.max(initial=-1)) + 1
        self._stock = stock
        self._homes: defaultdict[int, list[int]] = defaultdict(list)
        self._rooms = 0
        self._by_room: dict[int, list[int]] = {}
        rooms = capacity - np.bincount(begun, weights=lengths, minlength=self.count).astype(np.int64)
        order = np.argsort(rooms, kind="stable")
        values, starts = np.unique(rooms[order], return_index=True)
        for room, bins in zip(values.tolist(), np.split(order, starts[1:]), strict=False):
            self._put(room, bins.tolist())

    def homes(self) -> np.ndarray:
        """The bins of all placed documents, those of the longest first: int64."""
        return np.array([bin for length in sorted(self._homes, reverse=True) for bin in self._homes[length]], np.int64)

    def complete(self) -> None:
        """Fill bins to the last token while the stock has one document or two that do, the roomiest bins first."""
        aside = []
        typical = float(np.average(np.arange(len(self._stock)), weights=self._stock)) if self._stock.any() else 0.0
        while self._rooms:
            room = self._rooms.bit_length() - 1
            bins = self._take(room, self.count)
            while bins and (lengths := self._partners(room, typical)):
                most = min(int(self._stock[length]) // lengths.count(length) for length in lengths)
                if sum(lengths) < room:
                    most = min(most, max(1, len(bins) // 4))  # more of one length would skew what is left
                taken = bins[-most:]
                del bins[-most:]
                for length in lengths:
                    self._place(length, taken)
                self._put(room - sum(lengths), taken)
            if bins:
                aside.append((room, bins))
        for room, bins in aside:
            self._put(room, bins)

    def _partners(self, room: int, typical: float) -> tuple[int, ...]:
        """Lengths in stock for a bin with this room: an exact fit of one or two, else one that leaves room for two."""
        stock, longest = self._stock, len(self._stock) - 1
        if room <= longest and stock[room]:
            return (room,)
        low, high = max(1, room - longest), room // 2
        if low <= high:
            pairs = np.minimum(stock[low : high + 1], stock[room - high : room - low + 1][::-1])
            if 2 * high == room:
                pairs[-1] //= 2
            shorter = low + int(pairs.argmax())  # the pair with most in stock, so that the stock stays mixed
            if pairs[shorter - low]:
                return (shorter, room - shorter)
        if room > 2 * typical:
            common = int(stock[: room + 1].argmax())
            return (common,) if stock[common] else ()
        return ()

    def fit(self) -> None:
        """Best fit of the whole stock, longest first."""
        for length in np.flatnonzero(self._stock)[::-1].tolist():
            while documents := int(self._stock[length]):
                room = self._tightest(length)
                each = min(room // length, documents)  # equal documents that the tightest bin takes in a row
                wanted = max(1, documents // each)
                bins = self._open(wanted) if room == self.capacity else self._take(room, wanted)
                self._place(length, bins * each)
                self._put(room - each * length, bins)

    def _tightest(self, length: int) -> int:
        fitting = self._rooms >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity

    def _open(self, count: int) -> list[int]:
        self.count += count
        return list(range(self.count - count, self.count))

    def _place(self, length: int, bins: list[int]) -> None:
        self._stock[length] -= len(bins)
        self._homes[length] += bins

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
