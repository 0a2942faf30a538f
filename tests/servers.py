"""A server that really drafts, one token after the other, and counts as vLLM does; tests hold `accept` against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

Next = Callable[[tuple[int, ...]], int]  # what the model says after this text
Guess = Callable[[tuple[int, ...], tuple[int, ...]], int]  # what the head drafts after this text and its drafts so far


@dataclass
class Counts:
    """vLLM's counters: drafts, and accepted tokens by position."""

    drafts: int = 0
    accepted: list[int] = field(default_factory=list)

    def observe(self, accepted: int) -> None:
        self.drafts += 1
        for position in range(accepted):
            self.accepted[position] += 1


def serve(
    model: Next, head: Guess, prompt: Sequence[int], draft_length: int, stops: set[int], max_tokens: int
) -> tuple[list[int], Counts]:
    """The answer and its counters: a step drafts, checks, takes what is right and one token more, is counted, and only
    then the answer is cut off where it ends.
    """
    asked, counts = tuple(prompt), Counts(accepted=[0] * draft_length)
    said = [model(asked)]
    while len(said) < max_tokens and not stops & set(said):
        drafts: tuple[int, ...] = ()
        for _ in range(draft_length):
            drafts += (head(asked + tuple(said), drafts),)
        new: list[int] = []
        for drafted in (*drafts, None):
            new.append(model(asked + tuple(said + new)))
            if drafted != new[-1]:
                break
        counts.observe(len(new) - 1)
        for token in new:
            said.append(token)
            if token in stops or len(said) == max_tokens:
                break
    return said, counts


def after(model: Next, text: Sequence[int], count: int) -> list[int]:
    """What the model goes on to say."""
    found: list[int] = []
    for _ in range(count):
        found.append(model((*text, *found)))
    return found


@dataclass(frozen=True)
class Toy:
    """A model and a head without weights: hashes of the text. The head is right about `skill` times in ten."""

    seed: int
    skill: int
    vocabulary: int = 12

    def says(self, text: tuple[int, ...]) -> int:
        """Of the last three tokens."""
        return self._number("model", text[-3:]) % self.vocabulary

    def drafts(self, text: tuple[int, ...], drafts: tuple[int, ...]) -> int:
        """Of everything."""
        number, right = self._number("head", (*text, -1, *drafts)), self.says(text + drafts)
        return (
            right if number % 10 < self.skill else (right + 1 + number // 10 % (self.vocabulary - 1)) % self.vocabulary
        )

    def _number(self, who: str, ids: Sequence[int]) -> int:
        return int.from_bytes(blake2b(f"{self.seed} {who} {tuple(map(int, ids))}".encode(), digest_size=6).digest())


class ToyDrafter:
    """`Drafter.guesses` for a toy: at each row of a pack, fed with the document's own tokens."""

    def __init__(self, toy: Toy) -> None:
        import torch

        self.toy, self.device = toy, torch.device("cpu")

    def guesses(self, pack: Any, steps: int, rows: Any) -> Any:
        import torch

        lengths = [len(document.ids) for document in pack.documents]
        starts = np.cumsum([0, *lengths])
        made = np.full((steps, len(rows)), -1)
        for column, row in enumerate(rows.tolist()):
            number = int(np.searchsorted(starts, row, side="right")) - 1
            ids = tuple(pack.documents[number].ids.tolist())
            at = row - int(starts[number])
            for step in range(steps):
                made[step, column] = self.toy.drafts(ids[: at + 2], ids[at + 2 : at + 2 + step])
        return torch.from_numpy(made)
