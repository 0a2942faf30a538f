from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparkctl.data.chat import TooLong
from sparkctl.data.ingest import BATCH, CHARACTERS, Earlier, Ingest
from sparkctl.data.read import BadLine, Example
from sparkctl.data.tokens import Row, TokenStore, TokenStoreWriter


class Encoded:
    def __init__(self, text: str) -> None:
        self.input_ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
        self.trained = np.arange(len(text)) >= 1
        self.holds_markers = "<|" in text
        self.assistant_turns = 1


class Format:
    """Ids are the bytes of the user's text; what begins with "refuse" is refused, "untrained" has no trained token.

    "endless" is told to be too long, untokenised, where there is a limit.
    """

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.batches: list[int] = []
        self.most: int | None = None

    def encode(self, examples: Sequence[Example], most: int | None = None) -> list[Any]:
        self.batches.append(len(examples))
        self.most = most
        if len(examples) == BATCH and not self.encoded:
            time.sleep(0.05)  # the first batch is the slowest
        return [self._one(example) for example in examples]

    def _one(self, example: Example) -> Any:
        text = example.messages[0]["content"]
        self.encoded.append(text)
        if text.startswith("endless") and self.most is not None:
            return TooLong(self.most + 1)
        if text.startswith("refuse"):
            return BadLine(f"{example.place}: refused", "mend it", example.place)
        made = Encoded(text)
        made.trained &= not text.startswith("untrained")
        return made


def write(path: Path, *texts: str) -> Path:
    with path.open("w") as file:
        for text in texts:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def text(row: Row) -> str:
    return bytes(row.input_ids.astype(np.uint8)).decode()


def test_rows_keep_the_files_order_over_many_batches(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3 * BATCH + 7)]
    rows: list[Row] = []
    first = 2 * BATCH - 24
    one, two = write(tmp_path / "a.jsonl", *texts[:first]), write(tmp_path / "b.jsonl", *texts[first:])
    seen = 0

    def count(amount: float) -> None:
        nonlocal seen
        seen += int(amount)

    tally = Ingest(Format(), rows.append).run([one, two], count)
    assert [text(row) for row in rows] == texts
    assert tally.read == [first, len(texts) - first]
    assert list(tally.lengths) == [len(t) for t in texts]
    assert seen == one.stat().st_size + two.stat().st_size
    assert rows[first].place.endswith("b.jsonl:1")


def test_what_the_template_refuses_is_named_or_counted(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "fine", *[f"refuse {i}" for i in range(7)], "untrained", "fine again")
    with pytest.raises(BadLine, match=r"a\.jsonl:2: refused"):
        Ingest(Format(), lambda row: None).run([data])
    rows: list[Row] = []
    tally = Ingest(Format(), rows.append, skip_bad=True).run([data])
    assert [text(row) for row in rows] == ["fine", "fine again"]
    assert (tally.dropped.bad_lines, tally.dropped.no_trained_token) == (7, 1)
    assert len(tally.bad) == 5


def test_what_was_not_tokenised_counts_as_too_long(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "fine", "endless", "not fine", "fine")
    rows: list[Row] = []
    tally = Ingest(Format(), rows.append, max_seq_length=4).run([data])
    assert ([text(row) for row in rows], tally.dropped.too_long, tally.read) == (["fine", "fine"], 2, [4])
    assert [r.place for r in rows] == ["a.jsonl:1", "a.jsonl:4"]
    assert Ingest(Format(), lambda row: None).run([data]).dropped.too_long == 0


def test_long_examples_make_smaller_batches(tmp_path: Path) -> None:
    texts = ["short"] * BATCH + ["long" * (CHARACTERS // 8)] * 6 + ["longest" * CHARACTERS, "short"]
    rows: list[Row] = []
    format = Format()
    Ingest(format, rows.append).run([write(tmp_path / "a.jsonl", *texts)])
    assert [text(row) for row in rows] == texts
    assert sorted(format.batches) == sorted([BATCH, 2, 2, 2, 1, 1])


def test_marker_examples_are_counted_and_the_first_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", *["plain", "<|im_start|>"] * 30)
    tally = Ingest(Format(), lambda row: None).run([data])
    assert tally.marker_examples == 30
    assert len(tally.marker_places) == 20
    assert tally.marker_places[0].endswith("a.jsonl:2")


def test_known_rows_are_not_encoded_again(tmp_path: Path) -> None:
    store = tmp_path / "tokens"
    store.mkdir()
    writer = TokenStoreWriter(store)
    first = write(tmp_path / "a.jsonl", "one", "two <|", "three")
    Ingest(Format(), writer.add).run([first])
    writer.finish(np.zeros(3, dtype=bool))
    rows: list[Row] = []
    format = Format()
    both = write(tmp_path / "b.jsonl", "four", "three", "two <|", "one")
    earlier = [Earlier(TokenStore.open(store))]
    tally = Ingest(format, rows.append, earlier=earlier, max_seq_length=5).run([both])
    assert format.encoded == ["four"]
    assert [text(row) for row in rows] == ["four", "three", "one"]
    assert (tally.reused, tally.dropped.too_long) == (2, 1)
    assert rows[1].place.endswith("b.jsonl:2")
    fresh: list[Row] = []
    Ingest(Format(), fresh.append, max_seq_length=5).run([both])
    for row, other in zip(rows, fresh, strict=True):
        assert (row.prompt_key, row.row_hash, row.turns) == (other.prompt_key, other.row_hash, other.turns)
        assert row.trained.tolist() == other.trained.tolist()
