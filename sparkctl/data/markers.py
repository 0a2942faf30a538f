"""Text of an example that looks like the template's own markers.

Such text is never trained, since the mask does not look for markers. It is counted and named because the model reads
it as what it imitates: a server makes the same special tokens of it.
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
        found |= {header.strip() for header in headers} | set(vocabulary.variables.values()) | vocabulary.stops
        markers = sorted(filter(str.strip, found), key=lambda marker: (-len(marker), marker))
        # most texts hold no character that a marker begins with: 20 times as fast to look for
        self._beginnings = re.compile("[" + re.escape("".join(sorted({m[0] for m in markers}))) + "]")
        self._markers = re.compile("|".join(map(re.escape, markers)))

    def held_by(self, example: Example) -> bool:
        """Whether any text that is not the model's holds one."""
        return any(self._beginnings.search(text) and self._markers.search(text) for text in _texts_of_others(example))


def _texts_of_others(example: Example) -> Iterator[str]:
    for message in example.messages:
        if message["role"] != "assistant":
            yield from _texts(message.get("content"))
    if example.tools:
        yield from _texts(example.tools)


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
