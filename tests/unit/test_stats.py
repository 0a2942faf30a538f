from __future__ import annotations

import numpy as np
import pytest

from sparkctl.data.stats import describe, histogram, round_up


def test_numbers_of_known_lengths() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)
    held_out = lengths > 98
    found = describe(lengths, lengths // 2, held_out, np.arange(100) // 2 * (lengths > 10), np.full(100, 3))
    assert (found.examples, found.train_examples, found.eval_examples) == (100, 98, 2)
    assert (found.tokens, found.train_tokens) == (5050, 5050 - 99 - 100)
    assert (found.assistant_tokens, found.train_assistant_tokens) == (2500, 2500 - 49 - 50)
    assert (found.mean, found.p50, found.p90, found.p95, found.p99, found.max) == (50.5, 50, 90, 95, 99, 100)
    assert found.duplicates == 9 + 45  # ten equal ones, and 45 pairs
    assert found.turns == 3
    assert found.mean_length_128 == 128


@pytest.mark.parametrize(("mean", "length"), [(5354, 5376), (5376, 5376), (1, 128), (128, 128), (129, 256)])
def test_the_mean_rule(mean: int, length: int) -> None:
    assert round_up(mean * 10, 10) == length


def test_the_mean_rule_rounds_a_fraction_up() -> None:
    assert round_up(128 * 3 + 1, 3) == 256


def test_every_document_is_in_the_histogram() -> None:
    for lengths in ([1], [7, 7], [8, 1, 1024], [1023], list(range(1, 3000))):
        found = histogram(np.array(lengths))
        assert sum(found.counts) == len(lengths)
        assert len(found.edges) == len(found.counts) + 1
        assert found.edges[0] <= min(lengths)
        assert found.edges[-1] > max(lengths)
