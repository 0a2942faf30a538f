"""Acceptance: the walk by hand, and against a server that drafts token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from servers import Counts, Toy, ToyDrafter, after, serve

from sparkctl.manifest.evidence import Acceptance
from sparkctl.mtp import accept
from sparkctl.mtp.accept import Subject, acceptance, compared, draft_rows, helps, hits, rates, walk
from sparkctl.mtp.answers import Answer

STOPS = {0}
LENGTHS = (1, 2, 3, 4)
RIGHT, WRONG = [True] * 6, [False] * 6


def table(*steps: list[bool]) -> np.ndarray:
    return np.array(steps)


@pytest.mark.parametrize(
    ("hits_NG", "drafts", "counts"),
    [
        (table(RIGHT), 3, [3]),  # places 0, 2, 4: one accepted and one added each time
        (table(RIGHT, RIGHT), 2, [2, 2]),
        (table(RIGHT, RIGHT, RIGHT), 2, [2, 2, 2]),  # places 0 and 4: the second draft goes past the end, and counts
        (table(RIGHT, RIGHT, RIGHT, RIGHT), 2, [2, 2, 2, 2]),
        (table(WRONG), 6, [0]),
        (table(WRONG, RIGHT, RIGHT), 6, [0, 0, 0]),  # what follows a wrong token is not looked at
        (table(RIGHT, WRONG, RIGHT), 3, [3, 0, 0]),
        (
            table([True, False, False, True, True, False], RIGHT),
            2,
            [2, 2],
        ),  # by three to place 3 and to the end
        (np.zeros((3, 0), dtype=bool), 0, [0, 0, 0]),  # an answer of one token
    ],
)
def test_the_walk(hits_NG: np.ndarray, drafts: int, counts: list[int]) -> None:
    found = walk(hits_NG, len(hits_NG))
    assert (found[0], found[1].tolist()) == (drafts, counts)


def test_a_shorter_draft_takes_another_way() -> None:
    hits_NG = table([True, True, False, True, True, True], [True, False, True, True, False, True])
    assert [(d, c.tolist()) for d, c in (walk(hits_NG, 1), walk(hits_NG, 2))] == [(4, [3]), (2, [2, 2])]


def served(toy: Toy, prompts: list[list[int]], draft_length: int, max_tokens: int) -> tuple[list[Answer], Counts]:
    """What the server says to each prompt, as answers, and its counters over all of them."""
    answers, together = [], Counts(accepted=[0] * draft_length)
    for prompt in prompts:
        said, counts = serve(toy.says, toy.drafts, prompt, draft_length, STOPS, max_tokens)
        together.drafts += counts.drafts
        together.accepted = [a + b for a, b in zip(together.accepted, counts.accepted, strict=True)]
        beyond = after(toy.says, prompt + said, max(LENGTHS) - 1)
        answers.append(Answer(*(np.array(ids, dtype=np.int32) for ids in (prompt, said, beyond))))
    return answers, together


def prompts(seed: int, count: int = 30) -> list[list[int]]:
    random = np.random.RandomState(seed)
    return [random.randint(0, 12, random.randint(1, 9)).tolist() for _ in range(count)]


def counted(toy: Toy, answers: list[Answer], draft_length: int) -> Counts:
    walks = [walk(hits_NG, draft_length) for hits_NG in hits(ToyDrafter(toy), answers, max(LENGTHS))]  # type: ignore[arg-type]
    return Counts(sum(drafts for drafts, _ in walks), sum(counts for _, counts in walks).tolist())


@pytest.mark.parametrize("draft_length", LENGTHS)
@pytest.mark.parametrize(("skill", "max_tokens"), [(0, 9), (7, 25), (9, 5), (10, 16)])
def test_counts_are_those_of_a_server(
    draft_length: int, skill: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "PACK", 90)  # several packs
    toy = Toy(seed=draft_length + skill, skill=skill)
    answers, truth = served(toy, prompts(skill), draft_length, max_tokens)
    ended = {bool(STOPS & set(answer.ids.tolist())) for answer in answers}
    assert ended == {True, False}  # some by the stop token, some by their length
    assert counted(toy, answers, draft_length) == truth


def one_row_later(answer: Answer) -> np.ndarray:
    return draft_rows(answer) + 1


def one_token_later(answer: Answer, guesses_NG: np.ndarray) -> np.ndarray:
    moved = Answer(answer.prompt, answer.ids[1:], np.append(answer.beyond, 99))
    return compared(moved, guesses_NG)


def without_the_models_token(hits_NG: np.ndarray, draft_length: int) -> tuple[int, np.ndarray]:
    accepted, place, drafts = np.cumprod(hits_NG[:draft_length], axis=0).sum(axis=0), 0, 0
    counts = np.zeros(draft_length, dtype=np.int64)
    while place < len(accepted):
        counts[: accepted[place]] += 1
        drafts, place = drafts + 1, place + max(1, int(accepted[place]))
    return drafts, counts


def nothing_beyond(answer: Answer, guesses_NG: np.ndarray) -> np.ndarray:
    cut = Answer(answer.prompt, answer.ids, np.full_like(answer.beyond, -1))
    return compared(cut, guesses_NG)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("draft_rows", one_row_later), ("compared", one_token_later), ("compared", nothing_beyond)],
)
def test_a_planted_error_is_seen(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(seed=1, skill=8)
    answers, truth = served(toy, prompts(1), 3, 25)
    assert counted(toy, answers, 3) == truth
    monkeypatch.setattr(accept, name, wrong)
    assert counted(toy, answers, 3) != truth


def test_a_walk_without_the_models_own_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(seed=1, skill=8)
    answers, truth = served(toy, prompts(1), 3, 25)
    monkeypatch.setitem(globals(), "walk", without_the_models_token)
    assert counted(toy, answers, 3) != truth


def test_a_row_of_the_manifest() -> None:
    """Answers of five tokens and of one. Place 0 of four takes both tokens, place 3 the first: two drafts."""
    answers = [Answer(np.zeros(3, np.int32), np.zeros(n, np.int32), np.zeros(1, np.int32)) for n in (5, 1)]
    hits_NG = [table([True, True, False, True], [True, False, False, False]), np.zeros((2, 0), dtype=bool)]
    row = acceptance(Subject("a", None, None, "x"), answers, hits_NG)  # type: ignore[arg-type]
    assert (row.prompts, row.tokens, row.drafts) == (2, 6, 2)
    assert (row.conditional, row.cumulative) == ([1.0, 0.5], [1.0, 0.5])
    assert (row.mean_accepted, row.mean_acceptance_length) == (1.5, 2.5)
    assert (row.shorter, row.by_length) == ([[pytest.approx(2 / 3, abs=1e-6)]], [pytest.approx(2 / 3, abs=1e-6), 1.5])


def test_a_conditional_rate_is_of_those_whose_earlier_tokens_were_accepted() -> None:
    answers = [Answer(np.zeros(3, np.int32), np.zeros(5, np.int32), np.zeros(1, np.int32))]
    row = acceptance(Subject("a", None, None, "x"), answers, [table([True, True, False, False], [True] * 4)])  # type: ignore[arg-type]
    assert (row.cumulative, row.conditional) == ([0.5, 0.5], [0.5, 1.0])


def test_rates_of_nothing_are_zero() -> None:
    assert rates([np.zeros((2, 0), dtype=bool)], 2) == (0, [0.0, 0.0])


def row(mean: float) -> Acceptance:
    return Acceptance(
        name="a", prompts=1, tokens=1, drafts=1, conditional=[mean], cumulative=[mean], mean_accepted=mean, shorter=[],
        made_from="x",
    )  # fmt: skip


def test_a_head_helps_where_more_is_accepted() -> None:
    assert helps(row(0.4), row(0.41))
    assert not helps(row(0.4), row(0.4))
    assert not helps(row(0.4), row(0.39))
    assert helps(row(0.4), row(0.4), losses=(2.0, 1.9))
    assert not helps(row(0.4), row(0.4), losses=(2.0, 2.0))
    assert not helps(row(0.4), row(0.39), losses=(2.0, 0.1))
    assert helps(row(0.4), row(0.41), losses=(2.0, 2.1))
