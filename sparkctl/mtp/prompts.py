"""Held-out prompts: what a server is asked when it is to say the last turn of a held-out example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparkctl.data.tokens import TokenStore, spans


@dataclass(frozen=True)
class Prompt:
    """The row of the token store, where it was read ("chats.jsonl:12"), and the ids before its last trained turn."""

    row: int
    place: str
    ids: np.ndarray  # int32 [P], P > 0


def held_out_prompts(store: TokenStore, count: int) -> list[Prompt]:
    """`count` prompts, or as many as there are, each another one: those with the smallest hashes.

    So the choice looks random, is the same each time, and changes little in a later round, which holds the same
    examples out and some more.
    """
    rows = np.flatnonzero(store.held_out)
    _, first = np.unique(store.prompt_keys[rows], return_index=True)  # in the order of their hashes
    found: list[Prompt] = []
    for row in map(int, rows[first]):
        if len(found) == count:
            break
        ids = last_prompt(*store.document(row))
        if len(ids):
            found.append(Prompt(row, store.place(row), ids))
    return found


def last_prompt(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The ids in front of the last span of trained tokens; none where it begins the document or there is no span."""
    edges = spans(trained)
    return ids[: edges[-2]] if len(edges) else ids[:0]
