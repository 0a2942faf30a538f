"""Text of an example that looks like the template's own markers.

It is counted and named because the model reads it as what it imitates: a server makes the same special tokens of it.
What others say is never trained, whatever it holds, since the mask does not look for markers. In the model's own words
`<think>` and `<tool_call>` are in their place; counted there are special tokens and headers, and at the first token
that would stop a server training ends (`chat.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from sparkctl.data.messages import Example
from sparkctl.data.tokenizer import Vocabulary

MARKER = re.compile(r"<[^\s<>]+>|\[/?[A-Z][A-Z_]*\]")  # how templates write their markers


class Markers:
    """The markers of one template: what is written as such in it, its headers, and the tokens it knows by name."""

    def __init__(self, literals: Iterable[str], headers: Iterable[str], vocabulary: Vocabulary) -> None:
        literals = list(literals)
        found = {marker for text in literals for marker in MARKER.findall(text)}
        found |= {token for token in vocabulary.added if any(token in text for text in literals)}
        reserved = {header.strip() for header in headers} | set(vocabulary.variables.values()) | vocabulary.stops
        self._others = _Search(found | reserved)
        self._answers = _Search(reserved | vocabulary.special)

    def held_by(self, example: Example) -> bool:
        """Whether a text of others holds any, or an answer one that is not the model's to say."""
        return any(map(self._others, _texts_of_others(example))) or any(map(self._answers, _texts_of_answers(example)))


class _Search:
    """Whether a text holds any of these strings."""

    def __init__(self, strings: Iterable[str]) -> None:
        strings = sorted(filter(str.strip, strings), key=lambda string: (-len(string), string))
        # most texts hold no character that a marker begins with: 20 times as fast to look for
        self._beginnings = re.compile("[" + re.escape("".join(sorted({s[0] for s in strings}))) + "]")
        self._strings = re.compile("|".join(map(re.escape, strings)))

    def __call__(self, text: str) -> bool:
        return bool(self._beginnings.search(text) and self._strings.search(text))


def _texts_of_others(example: Example) -> Iterator[str]:
    for message in example.messages:
        if message["role"] != "assistant":
            yield from _texts(message.get("content"))
    if example.tools:
        yield from _texts(example.tools)


def _texts_of_answers(example: Example) -> Iterator[str]:
    for message in example.messages:
        if message["role"] == "assistant":
            for key in ("content", "reasoning_content", "tool_calls"):
                yield from _texts(message.get(key))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
