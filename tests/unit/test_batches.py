from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ready

from sparkctl.data.batches import Pack, Schedule, eval_packs, share
from sparkctl.data.tokens import Row, TokenStore, TokenStoreWriter
from sparkctl.errors import SparkError

SETTINGS = dict(pack_length=128, gradient_accumulation=4, epochs=3, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of up to 100 tokens; every tenth is held out."""
    folder = tmp_path_factory.mktemp("tokens")
    random = np.random.RandomState(0)
    writer = TokenStoreWriter(folder)
    for i in range(300):
        length = random.randint(2, 100)
        ids = random.randint(0, 272, length).astype(np.int32)
        writer.add(Row(ids, random.rand(length) < 0.4, i, i.to_bytes(16, "big"), f"x:{i}"))
    writer.finish(np.arange(300) % 10 == 0)
    return folder


def ids(packs: list[Pack]) -> list[list[int]]:
    return [[document.id for document in pack.documents] for pack in packs]


def test_every_training_example_once_an_epoch_in_a_new_order(folder: Path) -> None:
    schedule = Schedule(TokenStore.open(folder), **SETTINGS)
    by_epoch: dict[int, list[list[int]]] = {}
    for n in range(schedule.steps):
        by_epoch.setdefault(schedule.epoch(n), []).extend(ids(schedule.step(n)))
    assert sorted(by_epoch) == [0, 1, 2]
    for packs in by_epoch.values():
        assert sorted(i for pack in packs for i in pack) == [i for i in range(300) if i % 10]
    assert by_epoch[0] != by_epoch[1]
    assert {frozenset(p) for p in by_epoch[0]} != {frozenset(p) for p in by_epoch[1]}


def test_the_seed_decides_every_epoch(folder: Path) -> None:
    store = TokenStore.open(folder)
    one, other = (Schedule(store, **SETTINGS | {"seed": seed}) for seed in (5, 6))
    for epoch in range(3):
        n = next(n for n in range(one.steps) if one.epoch(n) == epoch)
        assert ids(one.step(n)) != ids(other.step(n))


def test_counts_are_those_of_the_documents(folder: Path) -> None:
    schedule = Schedule(TokenStore.open(folder), **SETTINGS)
    for n in range(schedule.steps):
        packs = schedule.step(n)
        for pack in packs:
            assert pack.tokens == sum(len(document.ids) for document in pack.documents) <= 128
            assert pack.labels == sum(int(document.trained[1:].sum()) for document in pack.documents)
        assert schedule.labels(n) == sum(pack.labels for pack in packs)
        last = n + 1 == schedule.steps or schedule.epoch(n + 1) != schedule.epoch(n)
        assert len(packs) == 4 or (last and len(packs) < 4)


def test_a_step_is_the_same_asked_for_at_once_in_another_process(folder: Path) -> None:
    schedule = Schedule(TokenStore.open(folder), **SETTINGS)
    steps = [ids(schedule.step(n)) for n in range(schedule.steps)]
    script = (
        "import json, sys; from pathlib import Path\n"
        "from sparkctl.data.batches import Schedule; from sparkctl.data.tokens import TokenStore\n"
        "s = Schedule(TokenStore.open(Path(sys.argv[1])), **json.loads(sys.argv[2]))\n"
        "print(json.dumps([[[d.id for d in p.documents] for p in s.step(n)] for n in (s.steps - 1, 7)]))"
    )
    command = [sys.executable, "-c", script, str(folder), json.dumps(SETTINGS)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer == [steps[-1], steps[7]]


def test_max_steps_ends_early_and_changes_nothing_before(folder: Path) -> None:
    store = TokenStore.open(folder)
    short, whole = Schedule(store, **SETTINGS, max_steps=5), Schedule(store, **SETTINGS)
    assert short.steps == 5
    assert [ids(short.step(n)) for n in range(5)] == [ids(whole.step(n)) for n in range(5)]
    with pytest.raises(IndexError):
        short.step(5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_step_in_equal_counts(folder: Path, world_size: int) -> None:
    schedule = Schedule(TokenStore.open(folder), **SETTINGS)
    for n in range(schedule.steps):
        packs = schedule.step(n)
        shares = [share(packs, rank, world_size) for rank in range(world_size)]
        assert len({len(mine) for mine in shares}) == 1
        dealt = [document.id for mine in shares for pack in mine for document in pack.documents]
        assert sorted(dealt) == sorted(i for pack in ids(packs) for i in pack)


@pytest.mark.parametrize(("tokens", "shares"), [([8, 3, 6, 1], [9, 9]), ([1, 5, 9], [9, 6])])
def test_ranks_finish_together(tokens: list[int], shares: list[int]) -> None:
    """From the most tokens to the fewest, to and fro."""
    packs = [Pack([], count, 0) for count in tokens]
    assert [sum(pack.tokens for pack in share(packs, rank, 2)) for rank in range(2)] == shares


def test_eval_packs_hold_the_held_out_part(folder: Path) -> None:
    store = TokenStore.open(folder)
    packs = eval_packs(store, 128)
    assert sorted(i for pack in ids(packs) for i in pack) == list(range(0, 300, 10))
    assert ids(eval_packs(store, 128)) == ids(packs)
    assert max(pack.tokens for pack in packs) <= 128
    longest = int(store.lengths[store.held_out].max())
    for length in (longest - 1, 2):  # a held-out document may be longer than a pack
        longer = eval_packs(store, length)
        assert sorted(i for pack in ids(longer) for i in pack) == list(range(0, 300, 10))
        assert max(pack.tokens for pack in longer) == longest


def test_the_heaviest_packs_are_those_of_the_longest_document_and_of_most_tokens_labels_and_chunks(
    folder: Path, tmp_path: Path
) -> None:
    """The longest document leaves room that no other fits in; two others fill a pack; a third pair has most labels."""
    store = ready.store(tmp_path, [document(length, labels) for length, labels in KINDS], np.zeros(5, dtype=bool))
    heaviest = Schedule(store, **SETTINGS | {"pack_length": 100}).heaviest(64)
    assert [sorted(len(d.ids) for d in pack.documents) for pack in heaviest] == [[70], [48, 50], [40, 41]]
    assert [pack.labels for pack in heaviest] == [7, 10, 60]
    one = Schedule(store, **SETTINGS | {"pack_length": 400}).heaviest(64)
    assert [pack.tokens for pack in one] == [249]
    real = TokenStore.open(folder)
    schedule = Schedule(real, **SETTINGS | {"epochs": 5})
    lengths = [len(d.ids) for d in schedule.around_longest().documents]
    assert max(lengths) == np.where(real.held_out, 0, real.lengths).max()
    tried, all_packs = schedule.heaviest(8), [pack for n in range(schedule.steps) for pack in schedule.step(n)]
    assert longest(tried[0]) == longest(schedule.around_longest())
    for measure in (lambda pack: pack.tokens, lambda pack: pack.labels, chunks_of_eight):
        assert max(map(measure, tried)) == max(map(measure, all_packs))


def test_the_heaviest_packs_are_among_those_that_are_trained(folder: Path) -> None:
    """A few steps of an epoch are not refused for what they never meet, and are tried with what they do."""
    schedule = Schedule(TokenStore.open(folder), **SETTINGS | {"epochs": 3, "max_steps": 2})
    trained = [pack for n in range(schedule.steps) for pack in schedule.step(n)]
    tried = schedule.heaviest(8)
    assert {tuple(pack) for pack in ids(tried)} <= {tuple(pack) for pack in ids(trained)}
    assert longest(tried[0]) == max(map(longest, trained))
    for measure in (lambda pack: pack.tokens, lambda pack: pack.labels, chunks_of_eight):
        assert max(map(measure, tried)) == max(map(measure, trained))


def longest(pack: Pack) -> int:
    return max(len(document.ids) for document in pack.documents)


def chunks_of_eight(pack: Pack) -> int:
    return sum(-(-len(document.ids) // 8) for document in pack.documents)


KINDS = ((70, 7), (50, 5), (48, 5), (40, 30), (41, 30))  # tokens, labels at the end


def document(length: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(length, dtype=np.int32), np.arange(length) >= length - labels


def test_a_store_without_training_examples_is_an_error(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path)
    writer.add(Row(np.array([1, 2], dtype=np.int32), np.array([False, True]), 1, b"0" * 16, "x:1"))
    writer.finish(np.array([True]))
    with pytest.raises(SparkError, match="no training example"):
        Schedule(TokenStore.open(tmp_path), **SETTINGS)
