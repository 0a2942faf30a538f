"""From chat files to rows: read, render and tokenise, drop, and count. Memory is bounded by a few batches.

Two batches are in flight, since rendering is Python and tokenising is native threads: one uses the cores while the
other holds the interpreter. What is kept of each document for the statistics is 28 bytes.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparkctl.data.chat import TooLong
from sparkctl.data.read import BadLine, Example, read_examples
from sparkctl.data.split import prompt_key, row_hash, text_of
from sparkctl.data.tokens import Row, TokenStore, label_count
from sparkctl.manifest.schema import Dropped

if TYPE_CHECKING:
    from sparkctl.data.chat import ChatFormat, Encoded

BATCH = 128  # examples encoded at a time: rendering them takes longer than 20 cores need to tokenise them
CHARACTERS = 1 << 17  # or so many characters, where examples are long: short ones, of 1,000, come to as many
IN_FLIGHT = 2
SHOWN_BAD = 5
SHOWN_MARKERS = 20

Slot = tuple[Row | BadLine | TooLong, bool]  # what became of an example, and whether an earlier store had it


@dataclass
class Tally:
    """What was seen: the numbers of every kept document, and the counts of those that were not."""

    lengths: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    turns: array[int] = field(default_factory=lambda: array("i"))
    prompt_keys: array[int] = field(default_factory=lambda: array("Q"))
    token_keys: array[int] = field(default_factory=lambda: array("Q"))
    read: list[int] = field(default_factory=list)  # examples in each file
    dropped: Dropped = field(default_factory=Dropped)
    bad: list[str] = field(default_factory=list)  # messages of the first bad lines
    marker_examples: int = 0
    marker_places: list[str] = field(default_factory=list)
    reused: int = 0

    def keep(self, row: Row) -> None:
        """Count a document that goes into the store."""
        self.lengths.append(len(row.input_ids))
        self.labels.append(label_count(row.trained))
        self.turns.append(row.turns)
        self.prompt_keys.append(row.prompt_key)
        self.token_keys.append(int.from_bytes(blake2b(row.input_ids.tobytes(), digest_size=8).digest(), "little"))
        if row.holds_markers:
            self.marker_examples += 1
            self.marker_places += [row.place] * (len(self.marker_places) < SHOWN_MARKERS)

    def drop_bad(self, line: BadLine) -> None:
        """Count a line that cannot be an example."""
        self.dropped.bad_lines += 1
        self.bad += [line.message] * (len(self.bad) < SHOWN_BAD)


class Earlier:
    """Rows that an earlier store, made with the same tokenizer and template, holds already."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        hashes = store.row_hashes()
        self._order = np.argsort(hashes[:, 0], kind="stable")
        self._first = hashes[self._order, 0]
        self._second = hashes[self._order, 1]

    def find(self, hash: bytes, key: int, place: str) -> Row | None:
        """The row of that hash under its new place and prompt key, or None."""
        first, second = np.frombuffer(hash, dtype="<u8")
        at = int(np.searchsorted(self._first, first))
        if at == len(self._first) or self._first[at] != first or self._second[at] != second:
            return None
        i = int(self._order[at])
        ids, trained = self._store.document(i)
        return Row(ids, trained, key, hash, place, int(self._store.turns[i]), bool(self._store.holds_markers[i]))


class Ingest:
    """One pass over the files; rows go to `add` in the files' order."""

    def __init__(
        self,
        format: ChatFormat,
        add: Callable[[Row], None],
        *,
        seed: int = 0,
        max_seq_length: int | None = None,
        skip_bad: bool = False,
        earlier: Sequence[Earlier] = (),
    ) -> None:
        self._format, self._add, self._earlier = format, add, earlier
        self._seed, self._max_seq_length, self._skip_bad = seed, max_seq_length, skip_bad
        self.tally = Tally()

    def run(self, paths: Iterable[Path], on_bytes: Callable[[int], None] | None = None) -> Tally:
        """Read everything. Raises BadLine at the first line that is no example, unless they are to be skipped."""
        examples = (example for path in paths for example in self._read(path, on_bytes))
        for slots in _in_order(self._encode, _batches(examples)):
            for row, reused in slots:
                self._take(row, reused)
        return self.tally

    def _read(self, path: Path, on_bytes: Callable[[int], None] | None) -> Iterator[Example]:
        at = len(self.tally.read)
        self.tally.read.append(0)
        found = read_examples([path], skip_bad=self._skip_bad, on_bad=self.tally.drop_bad, on_bytes=on_bytes)
        for example in found:
            self.tally.read[at] += 1
            if _says_something(example):
                yield example
            else:
                self.tally.dropped.empty_assistant += 1

    def _encode(self, examples: list[Example]) -> list[Slot]:
        """Rows of a batch: known ones looked up, the others encoded together."""
        known = [self._known(example) for example in examples]
        new = [example for example, row in zip(examples, known, strict=True) if row is None]
        encoded = iter(self._format.encode(new, self._max_seq_length) if new else [])
        return [
            (row, True) if row is not None else (self._row(example, next(encoded)), False)
            for example, row in zip(examples, known, strict=True)
        ]

    def _known(self, example: Example) -> Row | None:
        if not self._earlier:
            return None
        hash, key = row_hash(example), prompt_key(example, self._seed)
        found = (store.find(hash, key, example.place) for store in self._earlier)
        return next((row for row in found if row is not None), None)

    def _row(self, example: Example, encoded: Encoded | BadLine | TooLong) -> Row | BadLine | TooLong:
        if isinstance(encoded, BadLine | TooLong):
            return encoded
        key, hash = prompt_key(example, self._seed), row_hash(example)
        turns, markers = encoded.assistant_turns, encoded.holds_markers
        return Row(encoded.input_ids, encoded.trained, key, hash, example.place, turns, markers)

    def _take(self, row: Row | BadLine | TooLong, reused: bool) -> None:
        dropped = self.tally.dropped
        if isinstance(row, BadLine):
            if not self._skip_bad:
                raise row
            self.tally.drop_bad(row)
        elif isinstance(row, TooLong) or len(row.input_ids) > (self._max_seq_length or math.inf):
            dropped.too_long += 1
        elif label_count(row.trained) == 0:
            dropped.no_trained_token += 1
        else:
            self.tally.keep(row)
            self.tally.reused += reused
            self._add(row)


def _says_something(example: Example) -> bool:
    """Whether some assistant turn has text, reasoning or a tool call."""
    return any(
        message["role"] == "assistant"
        and (
            text_of(message.get("content")).strip()
            or str(message.get("reasoning_content") or "").strip()
            or message.get("tool_calls")
        )
        for message in example.messages
    )


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    length = 0
    for example in examples:
        batch.append(example)
        length += _length(example)
        if len(batch) >= BATCH or length >= CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _length(example: Example) -> int:
    """Characters of the parts that can be long."""
    return sum(
        len(text_of(message.get("content")))
        + len(message.get("reasoning_content") or "")
        + sum(len(str(call["function"]["arguments"])) for call in message.get("tool_calls", ()))
        for message in example.messages
    )


def _in_order(work: Callable[[list[Example]], list[Slot]], batches: Iterator[list[Example]]) -> Iterator[list[Slot]]:
    """Results of `work` over the batches, in their order, with IN_FLIGHT of them under way."""
    waiting: deque[Future[list[Slot]]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
