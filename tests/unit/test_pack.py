from __future__ import annotations

import time

import numpy as np
import pytest

from sparkctl.data.pack import Packs, best_fit
from sparkctl.errors import SparkError


def fill(packs: Packs, lengths: np.ndarray, capacity: int) -> float:
    """Checks the packing whole, then returns its share of used tokens."""
    assert np.array_equal(np.sort(packs.order), np.arange(len(lengths)))
    used = np.add.reduceat(lengths[packs.order], packs.starts[:-1])
    assert (np.diff(packs.starts) > 0).all()
    assert used.max() <= capacity
    return float(lengths.sum() / (len(packs) * capacity))


def test_a_million_lengths_in_three_seconds() -> None:
    lengths = np.clip(np.random.RandomState(0).lognormal(5.5, 1, 1_000_000), 4, 8191).astype(np.int64)
    start = time.perf_counter()
    packs = best_fit(lengths, 32768, seed=0)
    assert time.perf_counter() - start < 3  # 0.5 s seen
    assert fill(packs, lengths, 32768) > 0.999


@pytest.mark.parametrize(("low", "capacity"), [(1, 4096), (16, 4096), (100, 4096), (50, 8192)])
def test_documents_shorter_than_a_quarter_fill_packs(low: int, capacity: int) -> None:
    lengths = np.random.RandomState(1).randint(low, capacity // 4, 200_000)
    assert fill(best_fit(lengths, capacity, seed=3), lengths, capacity) > 0.999


def test_exact_pairs_fill_what_best_fit_leaves() -> None:
    lengths = np.random.RandomState(4).randint(100, 300, 200_000)  # by best fit alone 99.4 %
    assert fill(best_fit(lengths, 4096, seed=0), lengths, 4096) > 0.999


def test_long_documents_leave_no_room_that_others_could_take() -> None:
    lengths = np.random.RandomState(2).randint(1, 1025, 500)
    packs = best_fit(lengths, 1024, seed=0)
    assert fill(packs, lengths, 1024) > 0.97
    used = np.sort(np.add.reduceat(lengths[packs.order], packs.starts[:-1]))
    assert used[0] + used[1] > 1024  # no two packs could be one


@pytest.mark.parametrize("lengths", [[8], [8, 8], [1, 7, 8, 2, 6], [3] * 7])
def test_small_cases(lengths: list[int]) -> None:
    fill(best_fit(np.array(lengths), 8, seed=0), np.array(lengths), 8)


def test_no_documents_no_packs() -> None:
    assert len(best_fit(np.zeros(0, dtype=np.int64), 8, seed=0)) == 0


def test_the_seed_decides() -> None:
    lengths = np.random.RandomState(3).randint(1, 200, 1000)
    one, same, other = (best_fit(lengths, 512, seed=seed) for seed in ((7, 0), (7, 0), (7, 1)))
    assert np.array_equal(one.order, same.order)
    assert not np.array_equal(one.order, other.order)


def test_another_seed_puts_other_documents_together_even_where_all_lengths_differ() -> None:
    lengths = np.arange(10, 310)
    mixes = [
        {frozenset(packs.pack(i).tolist()) for i in range(len(packs))}
        for packs in (best_fit(lengths, 2048, seed=seed) for seed in (0, 1))
    ]
    assert len(mixes[0] & mixes[1]) <= 1


def test_packs_come_in_no_order_of_their_documents_lengths() -> None:
    lengths = np.random.RandomState(3).randint(1, 600, 1000)
    packs = best_fit(lengths, 1024, seed=0)
    longest = [lengths[packs.pack(i)].max() for i in range(len(packs))]
    assert abs(np.corrcoef(longest, np.arange(len(packs)))[0, 1]) < 0.3  # 0.75 as they were begun, the longest first


def test_documents_are_mixed_within_packs() -> None:
    lengths = np.random.RandomState(3).randint(1, 200, 1000)
    packs = best_fit(lengths, 512, seed=0)
    inside = [np.diff(lengths[packs.pack(i)][1:]) for i in range(len(packs))]
    assert np.mean([(steps <= 0).all() for steps in inside]) < 0.5  # best fit places the longest first


def test_too_long_documents_are_counted() -> None:
    with pytest.raises(
        SparkError, match="2 of 4 documents are longer than a pack of 10 tokens; the longest has 12"
    ) as e:
        best_fit(np.array([3, 11, 12, 10]), 10, seed=0)
    assert e.value.hint == "use a pack length of at least 12"
