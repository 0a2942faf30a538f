from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparkctl.data.split import choose_held_out, prompt_key, row_hash


def example(*messages: tuple[str, Any], **extra: Any) -> Any:
    turns = [{"role": role, "content": content} for role, content in messages]
    return SimpleNamespace(
        messages=turns, tools=extra.get("tools"), template_kwargs=extra.get("kwargs", {}), place=str(Path("x:1")),
        untrained=extra.get("untrained", ()),
    )  # fmt: skip


BASE = (("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "4"))


def test_the_key_is_the_prompts() -> None:
    key = prompt_key(example(*BASE), 0)
    assert key == prompt_key(example(*BASE[:2], ("assistant", "Four.")), 0)
    assert key == prompt_key(example(BASE[0], ("user", [{"type": "text", "text": "What is 2 + 2?"}]), BASE[2]), 0)
    assert key == prompt_key(example(*BASE[:2], ("tool", "4"), BASE[2]), 0)
    assert key != prompt_key(example(BASE[0], ("user", "What is 2 + 3?"), BASE[2]), 0)
    assert key != prompt_key(example(BASE[1], BASE[2]), 0)
    assert key != prompt_key(example(*BASE), 1)
    assert key != prompt_key(example(("developer", "Be brief."), *BASE), 0)
    assert 0 <= key < 2**64


def test_turns_do_not_run_together() -> None:
    assert prompt_key(example(("user", "ab"), ("user", "c")), 0) != prompt_key(
        example(("user", "a"), ("user", "bc")), 0
    )


def test_the_row_hash_is_everything() -> None:
    one = row_hash(example(*BASE))
    assert one == row_hash(example(*BASE))
    assert len(one) == 16
    assert one != row_hash(example(*BASE[:2], ("assistant", "Four.")))
    assert one != row_hash(example(*BASE, tools=[{"name": "add"}]))
    assert one != row_hash(example(*BASE, kwargs={"enable_thinking": False}))
    assert one != row_hash(example(*BASE, untrained=(2,)))


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 2**63, count).astype(np.uint64) * np.uint64(2)


def test_about_the_fraction_is_held_out_and_more_data_moves_nobody() -> None:
    few, more = keys(20_000), np.concatenate([keys(20_000), keys(30_000, seed=1)])
    held_out = choose_held_out(few, 0.02)
    assert 0.017 < held_out.mean() < 0.023
    assert np.array_equal(choose_held_out(more, 0.02)[:20_000], held_out)


def test_the_same_prompt_falls_on_one_side() -> None:
    doubled = np.repeat(keys(1000), 3)
    assert (choose_held_out(doubled, 0.1).reshape(-1, 3).sum(1) % 3 == 0).all()


@pytest.mark.parametrize(("count", "held_out"), [(9, 0), (10, 1)])
def test_the_smallest_hash_stands_in_from_ten_on(count: int, held_out: int) -> None:
    many = keys(count) | np.uint64(2**62)  # no hash in the lowest 2 %
    chosen = choose_held_out(many, 0.02)
    assert chosen.sum() == held_out
    if held_out:
        assert chosen[many.argmin()]


def test_one_prompt_alone_is_trained() -> None:
    assert not choose_held_out(np.full(30, 2**63, dtype=np.uint64), 0.02).any()


def test_nothing_is_held_out_where_nobody_wants_it() -> None:
    assert not choose_held_out(keys(10_000), 0).any()


def test_a_child_keeps_what_the_parent_held_out() -> None:
    old = keys(12) | np.uint64(2**62)
    parent = choose_held_out(old, 0.02)
    assert parent.sum() == 1
    both = np.concatenate([old, keys(5000, seed=2)])
    child = choose_held_out(both, 0.02, inherited=old[parent])
    assert child[:12][parent].all()  # the fallback's choice is not the rule's
    assert not choose_held_out(both, 0.02)[:12][parent].any()
    assert 0.015 < child[12:].mean() < 0.025
    assert choose_held_out(both[:5], 0.0, inherited=both[:2]).tolist() == [True, True, False, False, False]
