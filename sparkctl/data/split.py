"""Which examples are held out, and how an example is known again in the next round.

The side is chosen by a hash of everything but the model's turns: a regenerated answer stays on its prompt's side, and
examples with the same prompt share one. The hash knows nothing of the other examples, so more data moves nobody.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparkctl.data.read import Example

PROMPT_ROLES = frozenset({"system", "developer", "user"})
KEYS = 2**64
RULES = b"trained 2"  # of what is trained of a chat: others make all rows new
FEWEST = 10  # examples below which nothing is held out
# Held-out examples below which a choice is chance: where nothing tells two models apart, 12 of 16 examples or more are
# on the side of the one in 4 % of the cases.
FEW = 16
ENOUGH = 23  # how many are to be expected, so that a split by hashes leaves FEW of them but for one case in twenty


def prompt_key(example: Example, seed: int) -> int:
    """uint64 hash of the system and user turns, in order."""
    turns = [[m["role"], text_of(m.get("content"))] for m in example.messages if m["role"] in PROMPT_ROLES]
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(blake2b(_bytes(turns), digest_size=8, salt=salt).digest(), "little")


def row_hash(example: Example) -> bytes:
    """16 bytes of hash over all that the chat template sees of an example, and which answers are not to be learnt."""
    seen: list[Any] = [example.messages, example.tools, example.template_kwargs]
    untrained = [sorted(example.untrained)] if example.untrained else []
    return blake2b(_bytes(seen + untrained), digest_size=16, person=RULES).digest()


def text_of(content: Any) -> str:
    """The text of a message's content: a string, text parts, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] if isinstance(part, dict) else part for part in content)
    return content or ""


def choose_held_out(keys: np.ndarray, fraction: float, inherited: np.ndarray | None = None) -> np.ndarray:
    """bool [N]: the held-out examples by their prompt keys (uint64 [N]).

    Held out are prompts whose hash falls into the lowest `fraction`, and those that an earlier round held out
    (`inherited`). Where that gives none of ten or more, the prompt with the smallest hash is, unless it is the only
    prompt. A fraction of 0 adds nothing to what is inherited.
    """
    known = np.zeros(0, dtype=np.uint64) if inherited is None else inherited
    held_out = np.isin(keys, known)
    if fraction <= 0 or len(keys) < FEWEST:
        return held_out
    held_out |= keys < np.uint64(min(int(fraction * KEYS), KEYS - 1))
    smallest = keys == keys.min()
    if not held_out.any() and not smallest.all():
        return smallest
    return held_out


def _bytes(value: Any) -> bytes:
    # the order of keys is kept: a template that prints a tool's arguments prints them in this order
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
